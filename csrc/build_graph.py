# SPDX-License-Identifier: BSD-3-Clause
"""Which source goes into which library, with which flags: the build.ninja that setup.py runs."""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # the libraries load in torch 2.11 and newer
HOST = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffunction-sections -Wall -Wextra -Werror -Icsrc"
NVCC = "-std=c++20 -O3 -DNDEBUG -Icsrc -Werror all-warnings -Xptxas -warn-spills,-Werror"
EMULATE = "-DASPP_EMULATE -Icsrc/cuda/emulation -fno-strict-aliasing -w"
DEFAULT_CUDA = "/usr/local/cuda"
ARCHITECTURES = "8.0;9.0a;10.0f;12.0f+PTX"
PORTABLE = "8.0+PTX"  # newer GPUs compile the PTX when they load it
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
X86_ISAS = {
    "isa_baseline": "",
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512bf16": f"{AVX512} -mavx512bf16",
}
RULES = """builddir = {0}
rule compile
  command = $argv -MD -MF $out.d
  depfile = $out.d
  deps = gcc
rule link
  command = $argv"""


def say(text):
    encoding = sys.stdout.encoding or "ascii"  # which may lack what a folder is called
    text = f"aspp_ext build: {text}".encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def refuse(text):
    raise SystemExit(f"aspp_ext build: {text}")


def read_env(name, default=""):
    """An environment variable without spaces around it; set but empty counts as not set."""
    return os.environ.get(name, "").strip() or default


def read_words(name):
    """The words of an environment variable, quoted as for a shell."""
    try:
        return shlex.split(read_env(name))
    except ValueError as error:
        refuse(f"{name} must be words as a shell takes them, got {read_env(name)!r}: {error}")


def objects_of(folder):
    """Where the objects of libraries in ``folder`` are, by a name that ninja can read."""
    return "build/" + re.sub(r"[^\w.+-]", "_", folder.name, flags=re.ASCII) + "-objects"


def find_ninja():
    """ninja's path: that of its Python package, or the first on PATH."""
    try:
        from ninja import BIN_DIR as folder
    except ImportError:
        folder = ""
    found = shutil.which("ninja", path=os.pathsep.join([folder, os.environ.get("PATH", "")]))
    return found or refuse("needs ninja: pip install ninja")


def find_cuda():
    """The CUDA toolkit's folder, or None after one line on why there is no CUDA library."""
    wish, nvcc = read_env("ASPP_EXT_CUDA", "auto"), shutil.which("nvcc")
    if wish not in ("auto", "0", "1", "emulate"):
        refuse(f"ASPP_EXT_CUDA must be auto, 0, 1 or emulate but is {wish!r}")
    if wish in ("0", "emulate"):
        return say(f"without CUDA: ASPP_EXT_CUDA={wish}")
    if not list(ROOT.glob("csrc/cuda/kernels/*.cu")):
        return say("without CUDA: csrc/cuda has no kernels yet")
    named = read_env("CUDA_HOME") or read_env("CUDA_PATH")
    found = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [Path(named)] if named else [*found, Path(DEFAULT_CUDA)]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    looked = named or f"PATH and {DEFAULT_CUDA}"
    if wish == "1":
        refuse(
            f"ASPP_EXT_CUDA=1 needs nvcc and cuda_runtime.h, not found in {looked}: set CUDA_HOME"
        )
    return say(f"without CUDA: no nvcc in {looked}")


def is_emulated():
    """Whether the CPU library gets the CUDA kernels, run by csrc/cuda/emulation."""
    if read_env("ASPP_EXT_CUDA") != "emulate":
        return False
    if not read_env("ASPP_EXT_LIBRARY_DIR"):
        refuse("ASPP_EXT_CUDA=emulate is for tests and needs an ASPP_EXT_LIBRARY_DIR of its own")
    return True


def split_architectures(text):
    """TORCH_CUDA_ARCH_LIST as a list of strings, with 9.0 rewritten to 9.0a."""
    result = []
    for arch in text.replace(" ", ";").strip(";").split(";"):
        number = arch.removesuffix("+PTX").rstrip("af")
        if not number.replace(".", "", 1).isdigit() or float(number) < 8:
            refuse(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or newer, like 12.0+PTX, got {arch!r}")
        if number == "9.0" and not arch.startswith("9.0a"):
            say(f"{arch} is built as 9.0a: plain 9.0 has no wgmma")
            arch = arch.replace("9.0", "9.0a")
        result.append(arch)
    return result


def digests_of_sources():
    """By what was seen right or wrong: of the sources that decide what runs there."""
    common = ("", "plan")
    folders = {
        "cpu": (*common, "cpu", "cpu/kernels"),
        "cuda": (*common, "cuda", "cuda/kernels", "cuda/ptx"),
        "plan": ("plan",),
    }
    root, digests = ROOT / "csrc", {}
    for name, places in folders.items():
        digest = hashlib.sha256()
        for path in sorted(path for place in places for path in (root / place).glob("*.*")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
        digests[name] = digest.hexdigest()[:16]
    return digests


def gpu_generations():
    """The major compute capabilities of the GPUs that are here, as {"9"}."""
    if not (tool := shutil.which("nvidia-smi")):
        return set()
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    lines = answer.stdout.split() if answer.returncode == 0 else []
    return {line.partition(".")[0] for line in lines}


def choose_architectures(everywhere):
    """TORCH_CUDA_ARCH_LIST; or all for a build that is to run `everywhere` and where
    ASPP_EXT_CUDA_ARCHS=all asks for them; or what the GPUs here need; or one, without a GPU."""
    if named := read_env("TORCH_CUDA_ARCH_LIST"):
        return split_architectures(named)
    if (wish := read_env("ASPP_EXT_CUDA_ARCHS", "auto")) not in ("auto", "all"):
        refuse(f"ASPP_EXT_CUDA_ARCHS must be auto or all but is {wish!r}")
    every, here = split_architectures(ARCHITECTURES), gpu_generations()
    if everywhere or wish == "all":
        return every
    if not here:
        say(f"no GPU seen: kernels for {PORTABLE} alone; ASPP_EXT_CUDA_ARCHS=all builds for all")
        return [PORTABLE]
    found = [arch for arch in every if arch.partition(".")[0] in here]
    return found if len(found) == len(here) else every


def read_log(path):
    """The lines of ninja's log, of which each is an output it made."""
    return path.read_text().splitlines()[1:] if path.exists() else []


def seconds_by_stage(lines):
    """How long the compilers took for each folder of sources, as text, from lines of the log."""
    spent = Counter()
    for line in lines:
        begin, end, _, output, _ = line.split("\t")
        folder = Path(output).parent.as_posix().partition("/csrc")[1:]
        spent["".join(folder).strip("/") or "linking"] += (int(end) - int(begin)) / 1000
    return ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in spent.most_common())


def gencodes(source, architectures):
    """nvcc's flags for one kernel file, or [] where none of the architectures can use it."""
    if source.stem.endswith("_sm90"):
        hopper = any(arch.startswith("9.0a") for arch in architectures)
        return ["-gencode=arch=compute_90a,code=sm_90a"] if hopper else []
    flags = []
    for arch in architectures:
        name = arch.removesuffix("+PTX").replace(".", "").replace("90a", "90")
        plain = name.rstrip("af")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name.rstrip('f')}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def system(folder):
    """Flags for another project's headers: no warnings, and no machine's path in our messages."""
    return ["-isystem", folder, f"-fmacro-prefix-map={folder}/="]


class Graph(list):
    """The lines of a build.ninja; paths are relative to the repository, in the objects too."""

    def __init__(self, folder, cxx, torch):
        super().__init__([RULES.format(folder)])
        self.folder, self.cxx, self.torch, self.libraries = folder, cxx, torch, []
        flags = [*read_words("CPPFLAGS"), *read_words("CXXFLAGS")]
        self.host = [*cxx, *HOST.split(), *flags]
        self.tensor = [*self.host, TORCH, *system(torch / "include")]
        self.shared = [*cxx, "-shared", *flags, *read_words("LDFLAGS")]
        self.plan = self.compile("csrc/plan/*.cpp", self.host)
        self.bindings = self.compile("csrc/operator_*.cpp", self.tensor)

    def add(self, rule, output, inputs, before, after=(), implicit=""):
        argv = shlex.join(map(str, [*before, *inputs, *after, "-o", output])).replace("$", "$$")
        self.append(f"build {output}: {rule} {' '.join(inputs)} | {implicit}")
        self.append(f"  argv = {argv}\n  description = {output}")
        return output

    def compile(self, pattern, argv, variant="", without=()):
        folder = Path(self.folder, variant)
        paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        paths = [path for path in paths if not path.endswith(tuple(without))]
        return [self.add("compile", f"{folder}/{p}.o", [p], [*argv, "-c"]) for p in paths]

    def link(self, name, objects, libraries=(), implicit=""):
        argv = [*self.shared, "-Wl,--gc-sections", "-Wl,-rpath,$ORIGIN/../torch/lib"]
        argv += [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed"]
        output = f"{self.folder}/{name}"
        self.add("link", output, [*self.plan, *objects], argv, libraries, implicit)
        self.libraries.append(output)

    def add_planner(self):
        import pybind11

        python = [*system(pybind11.get_include()), *system(sysconfig.get_path("include"))]
        # Its templates take the compiler half as long at -O1, and Python is what calls them.
        objects = self.compile("csrc/plan_bindings.cpp", [*self.host, *python, "-O1"])
        self.link("_plan" + sysconfig.get_config_var("EXT_SUFFIX"), objects)

    def add_cpu(self, emulated=False):
        """The kernels once per instruction set; which of them runs is chosen at run time.

        Emulated, the CUDA bindings and kernels take the place of the CPU's pyramids, of which one
        instruction set is enough.
        """
        x86 = platform.machine() in ("x86_64", "AMD64") and not emulated
        isas = X86_ISAS if x86 else {"isa_baseline": ""}
        objects = [*self.bindings, *self.compile("csrc/library.cpp", self.tensor)]
        argv = [*self.tensor, *["-DASPP_X86=1"] * x86]
        replaced = ["/pyramid.cpp", "/pyramid_backward.cpp", "/separable.cpp"] * emulated
        objects += self.compile("csrc/cpu/*.cpp", argv, without=replaced)
        if emulated:
            objects += self.emulate()
        for isa, options in isas.items():
            argv = [*self.tensor, f"-DASPP_ISA={isa}", *options.split()]
            objects += self.compile("csrc/cpu/kernels/*.cpp", argv, isa)
        self.link("libaspp_cpu.so", objects, ["-ltorch_cpu", "-Wl,-z,defs"])
        return sorted(isas)

    def emulate(self):
        argv, objects = [*self.tensor, *EMULATE.split()], []
        for folder in ("cuda", "cuda/emulation"):
            objects += self.compile(f"csrc/{folder}/*.cpp", argv)
        return objects + self.compile("csrc/cuda/kernels/*_sm80.cu", [*argv, "-xc++"])

    def add_cuda(self, home, architectures):
        nvcc = [home / "bin/nvcc", *NVCC.split(), "-ccbin", self.cxx[-1]]
        nvcc += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"]
        nvcc += ["--threads", read_env("NVCC_THREADS", "1")]
        objects, has_sm90 = [*self.bindings], False
        for source in sorted(ROOT.glob("csrc/cuda/kernels/*.cu")):
            if flags := gencodes(source, architectures):
                has_sm90 |= source.stem.endswith("_sm90")
                objects += self.compile(source.relative_to(ROOT).as_posix(), [*nvcc, *flags])
        cuda = ["-DUSE_CUDA", *["-DASPP_SM90=1"] * has_sm90, *system(home / "include")]
        objects += self.compile("csrc/cuda/*.cpp", [*self.tensor, *cuda])
        libraries, stand_in = ["-ltorch_cpu", "-ltorch_cuda", "-Wl,--as-needed"], ""
        if not (self.torch / "lib/libtorch_cuda.so").exists():
            # A CPU-only torch: an empty library of that name records the dependency.
            stand_in = f"{self.folder}/stand_in/libtorch_cuda.so"
            empty = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-xc++", "/dev/null"]
            self.add("link", stand_in, [], [*self.cxx, *empty])
            libraries.insert(0, f"-L{self.folder}/stand_in")
        libraries += [f"-L{home / 'lib64'}", f"-L{home / 'lib'}", "-lcudart_static"]
        self.link("libaspp_cuda.so", objects, [*libraries, "-ldl", "-lrt", "-lpthread"], stand_in)
