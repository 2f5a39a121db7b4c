# SPDX-License-Identifier: BSD-3-Clause
"""Real ASPP classes, and pyramids that only look like them, of what is in requirements-zoo.txt.

`REAL[name].make()` imports the package and builds its class with few channels. Where a package's
`__init__` wants what ASPP does not, it is passed by: `Source` says how. Classes and their layers
are the package's own in any case.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from aspp_ext.compat import import_torchvision

MAP = (2, 16, 13, 15)
MAP_3D = (2, 16, 7, 9, 8)
ONE = (MAP,)


class Real(NamedTuple):
    """A real class of a package."""

    package: str  # distribution name as pip knows it
    make: Callable[[], nn.Module]  # raises ImportError where the package is absent
    shapes: tuple[tuple[int, ...], ...]  # of the tensors of its one argument
    pyramid: bool  # False: a look-alike that must be left alone
    remark: str  # what is odd about it: concat order, biases, norms, ...
    list_input: bool = False  # the argument is a list of the tensors, even if it is one


class _Nothing:
    """A base class, a decorator or a decorator's maker, none of which does anything."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, decorated: Any) -> Any:
        return decorated


class _Stub(ModuleType):
    """A module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Nothing,), {})


class _StubFinder(MetaPathFinder, Loader):
    """Finds stubs for modules of these names and for those below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if any(f"{fullname}.".startswith(f"{name}.") for name in self.names):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stubs(names: Sequence[str]) -> Iterator[None]:
    """Imports in this block find stubs of these modules; nothing of them is left behind it."""
    finder = _StubFinder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Stub):
                del sys.modules[name]


class Source(NamedTuple):
    """A module, and what is passed by when it is imported: packages above it and those of `bare`
    are put in place without running their `__init__`. `a=b+c` gives `a` the names of the modules
    `b` and `c` instead.
    """

    module: str
    bare: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()  # modules that are empty meanwhile, and all below them
    inits: bool = False  # the packages above it are imported as usual

    def load(self) -> ModuleType:
        """Returns the module; raises ImportError where the package, or what it needs, is absent."""
        import_torchvision()  # many packages import it, and it needs help
        if self.module in sys.modules:
            return sys.modules[self.module]
        parts = self.module.split(".")
        above = [] if self.inits else [".".join(parts[:end]) for end in range(1, len(parts))]
        given = {name: names for name, _, names in (entry.partition("=") for entry in self.bare)}
        for name in (*above, *given):
            _put_in_place(name)
        with _stubs(self.stubs):
            for name, others in given.items():
                for other in filter(None, others.split("+")):
                    names = vars(importlib.import_module(other)).items()
                    public = {key: value for key, value in names if not key.startswith("__")}
                    vars(sys.modules[name]).update(public)
            return importlib.import_module(self.module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.load(), name)


def _put_in_place(name: str) -> None:
    if name in sys.modules:
        return
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.modules[name] = module = module_from_spec(spec)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _usual(module: str) -> Source:
    return Source(module, inits=True)


def _mmseg(module: str) -> Source:
    stubs = ("cv2", "ftfy", "mmcv.ops")
    return Source(f"mmseg.models.{module}", bare=("mmcv",), stubs=stubs)


def _super_gradients(module: str) -> Source:
    modules = "super_gradients.modules"
    models = "super_gradients.training.models"
    common = "super_gradients.common"
    enum = f"{common}.data_types.enum"
    blocks = ("anti_alias", "pixel_shuffle", "conv_bn_relu_block")
    return Source(
        f"{models}.segmentation_models.{module}",
        bare=(
            f"{common}={enum}.upsample_mode+{enum}.downsample_mode",
            f"{common}.data_types",
            f"{enum}={enum}.downsample_mode",
            f"{modules}={'+'.join(f'{modules}.{block}' for block in blocks)}",
            f"{models}.classification_models",
        ),
        stubs=(
            f"{common}.registry",
            "super_gradients.module_interfaces",
            "super_gradients.training.utils",
            f"{models}.classification_models.resnet",
            f"{models}.segmentation_models.segmentation_module",
        ),
    )


autotimm = Source("autotimm.heads._heads")
background_matting = _usual("BackgroundMattingV2.model.model")
change_detection = Source("change_detection_pytorch.deeplabv3.decoder")
csseg = Source("csseg.modules.models.decoders.aspphead", stubs=("inplace_abn",))
encoding = Source(
    "encoding.models.sseg.deeplab", stubs=("encoding.models.sseg.base", "encoding.models.sseg.fcn")
)
encoding_nn = Source("encoding.nn.customize", stubs=("encoding.nn.splat", "encoding.nn.rectify"))
mmdet = Source(
    "mmdet.models.necks.rfp",
    bare=("mmcv",),
    stubs=("cv2", "pycocotools", "shapely", "terminaltables"),
)
mmseg_aspp = _mmseg("decode_heads.aspp_head")
mmseg_mscan = _mmseg("backbones.mscan")
mmseg_psp = _mmseg("decode_heads.psp_head")
mmseg_separable = _mmseg("decode_heads.sep_aspp_head")
mmseg_uper = _mmseg("decode_heads.uper_head")
mmseg_utils = _mmseg("utils")
mobilenet_v2 = _usual("transformers.models.mobilenet_v2.modeling_mobilenet_v2")
mobilevit = _usual("transformers.models.mobilevit.modeling_mobilevit")
mobilevit_v2 = _usual("transformers.models.mobilevitv2.modeling_mobilevitv2")
monai_aspp = _usual("monai.networks.blocks.aspp")
monai_daf = _usual("monai.networks.nets.daf3d")
nemotron = _usual("nemotron_ocr.inference.models.detector.aspp")
pymic_cnn = _usual("pymic.net.cnn.coplenet2d")
pymic_net2d = _usual("pymic.net.net2d.cople_net")
pytorchcv = _usual("pytorchcv.models.deeplabv3")
pytorchcv_psp = _usual("pytorchcv.models.pspnet")
semtorch = Source("semtorch.models.modules.module", stubs=("six",))
smp = _usual("segmentation_models_pytorch.decoders.deeplabv3.decoder")
smp_psp = _usual("segmentation_models_pytorch.decoders.pspnet.decoder")
smp_upernet = _usual("segmentation_models_pytorch.decoders.upernet.decoder")
smp_3d = Source("segmentation_models_pytorch_3d.decoders.deeplabv3.decoder")
ssseg = Source("ssseg.modules.models.segmentors.deeplabv3.aspp", stubs=("dill",))
ssseg_psp = Source("ssseg.modules.models.segmentors.pspnet.ppm", stubs=("dill",))
ssseg_separable = Source("ssseg.modules.models.segmentors.deeplabv3plus.aspp", stubs=("dill",))
super_context = _super_gradients("context_modules")
super_ddrnet = _super_gradients("ddrnet")
terratorch = Source(
    "terratorch.models.decoders.aspp_head",
    bare=("terratorch.registry=terratorch.registry.registry",),
)
toolbelt = Source(
    "pytorch_toolbelt.modules.spp", bare=("pytorch_toolbelt",), stubs=("cv2",), inits=True
)
torchseg = _usual("torchseg.decoders.deeplabv3.decoder")
torchvision = _usual("torchvision.models.segmentation.deeplabv3")
torchvision_lraspp = _usual("torchvision.models.segmentation.lraspp")
upernet = _usual("transformers.models.upernet.modeling_upernet")

RATES = (2, 4, 6)
UP = {"mode": "bilinear", "align_corners": True}  # torch-encoding's default
RELU = {"type": "ReLU", "inplace": True}
BN_2D = {"type": "BatchNorm2d"}
MM: dict[str, Any] = {"channels": 8, "num_classes": 3, "norm_cfg": {"type": "BN"}}
LEVELS = ((2, 8, 25, 29), (2, 12, 13, 15), (2, 16, 7, 8))


def _mobilevit(modeling: Source, config: str, head: str, **sizes: Any) -> nn.Module:
    options = {"aspp_out_channels": 8, "atrous_rates": RATES, "num_labels": 3, **sizes}
    return getattr(modeling, head)(getattr(modeling, config)(**options))


def _mobilevit_v1(head: str) -> nn.Module:
    return _mobilevit(mobilevit, "MobileViTConfig", head, neck_hidden_sizes=[8] * 5 + [16, 24])


def _mobilevit_v2(head: str) -> nn.Module:
    return _mobilevit(mobilevit_v2, "MobileViTV2Config", head, width_multiplier=1 / 32)


def _mobilenet() -> nn.Module:
    config = mobilenet_v2.MobileNetV2Config(depth_multiplier=0.05, num_labels=3)
    return mobilenet_v2.MobileNetV2DeepLabV3Plus(config)


def _csseg() -> nn.Module:
    # ABN, its default, is inplace_abn's; its initialisation fails for BatchNorm2d
    act = {"type": "LeakyReLU", "inplace": True}
    return csseg.ASPPHead(16, 8, (1, *RATES), {"type": "SyncBatchNorm"}, act)


def _ssseg_aspp(aspp: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return aspp(16, 8, (1, *RATES), norm_cfg=BN_2D, act_cfg=RELU, **options)


def _toolbelt(branch: str, **options: Any) -> nn.Module:
    return toolbelt.ASPP(16, 8, getattr(toolbelt, branch), RATES, **options)


def _lraspp() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 3, stride=2, padding=1))
    backbone = torchvision_lraspp.IntermediateLayerGetter(layers, {"0": "low", "1": "high"})
    return torchvision_lraspp.LRASPP(backbone, 8, 16, 3)


WIDE = ((2, 64, 13, 15),)
VOLUME = (MAP_3D,)
DAF_RATES = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 6, 6))


def _aspp(
    remark: str,
    make: Callable[[], nn.Module],
    shapes: tuple[tuple[int, ...], ...] = ONE,
    list_input: bool = False,
) -> Real:
    return Real("", make, shapes, True, remark, list_input)


def _like(remark: str, make: Callable[[], nn.Module], *options: Any) -> Real:
    return _aspp(remark, make, *options)._replace(pyramid=False)


BASIC = "1x1, rates, pooling, projection: the layout that others copy"
SEPARABLE = "nothing between depthwise and pointwise"
BARE = "bare convolutions with biases; no pooling; LeakyReLU"
MM_ASPP = "pooling first; the projection is 3x3; a classifier"
NAMED = "a layer has a convolution, a norm and an activation by name"
POOLS = "poolings of several sizes, joined to the map"

_ROWS: dict[str, Real] = {  # a name begins with the distribution's
    "torchvision ASPP": _aspp(BASIC, lambda: torchvision.ASPP(16, RATES, 8)),
    "torchvision DeepLabHead": _aspp(
        "ASPP to 256 channels, and a head", lambda: torchvision.DeepLabHead(16, 3, RATES)
    ),
    "backgroundmattingv2 MattingBase.aspp": _aspp(
        "torchvision's class, 320 to 256 channels, rates 3, 6, 9",
        lambda: background_matting.MattingBase("mobilenetv2").aspp,
        ((2, 320, 7, 9),),
    ),
    "segmentation_models_pytorch ASPP": _aspp(BASIC, lambda: smp.ASPP(16, 8, RATES, False, 0.5)),
    "segmentation_models_pytorch ASPP, separable": _aspp(
        SEPARABLE, lambda: smp.ASPP(16, 8, RATES, True, 0.5)
    ),
    "torchseg ASPP": _aspp(BASIC, lambda: torchseg.ASPP(16, 8, RATES)),
    "torchseg ASPP, separable": _aspp(SEPARABLE, lambda: torchseg.ASPP(16, 8, RATES, True)),
    "change-detection-pytorch ASPP": _aspp(BASIC, lambda: change_detection.ASPP(16, 8, RATES)),
    "autotimm ASPP": _aspp("1x1 apart from the rates", lambda: autotimm.ASPP(16, 8, RATES)),
    "autotimm DeepLabV3PlusHead": _aspp(
        "ASPP inside a decoder, which reads the first and the last of four maps",
        lambda: autotimm.DeepLabV3PlusHead([8, 8, 8, 16], 3, 8, 8, RATES),
        ((2, 8, 25, 29), (2, 8, 13, 15), (2, 8, 13, 15), (2, 16, 13, 15)),
        True,
    ),
    "torch-encoding ASPP_Module": _aspp(
        "b0 to b4; align_corners; Dropout2d",
        lambda: encoding.ASPP_Module(64, RATES, nn.BatchNorm2d, UP),
        WIDE,
    ),
    "torch-encoding DeepLabV3Head": _aspp(
        "ASPP_Module and a head",
        lambda: encoding.DeepLabV3Head(64, 3, nn.BatchNorm2d, UP, atrous_rates=RATES),
        WIDE,
    ),
    "pytorchcv AtrousSpatialPyramidPooling": _aspp(
        "a Sequential that concatenates; align_corners; rates 12, 24, 36",
        lambda: pytorchcv.AtrousSpatialPyramidPooling(64, None),
        WIDE,
    ),
    "pytorchcv AtrousSpatialPyramidPooling, fixed size": _aspp(
        "pooling is resized to a constant: other maps fail",
        lambda: pytorchcv.AtrousSpatialPyramidPooling(64, (13, 15)),
        WIDE,
    ),
    "semtorch _ASPP": _aspp(
        "pooling first; norm and ReLU behind depthwise; align_corners; Dropout2d; 6, 12, 18",
        lambda: semtorch._ASPP(16, 8),
    ),
    "pytorch-toolbelt ASPP": _aspp(
        "3x3 of rate 1, pooling, rates; Dropout2d", lambda: _toolbelt("ASPPModule")
    ),
    "pytorch-toolbelt ASPP, separable": _aspp(
        "separable, also of rate 1; pooling second; " + SEPARABLE,
        lambda: _toolbelt("SeparableASPPModule"),
    ),
    "pytorch-toolbelt ASPP, SiLU": _aspp(
        "SiLU in the first branch and the projection, ReLU in the others",
        lambda: _toolbelt("ASPPModule", activation="silu"),
    ),
    "sssegmentation ASPP": _aspp("the projection is 3x3", lambda: _ssseg_aspp(ssseg.ASPP)),
    "sssegmentation DepthwiseSeparableASPP": _aspp(
        "norm and ReLU behind depthwise; the projection is 3x3",
        lambda: _ssseg_aspp(ssseg_separable.DepthwiseSeparableASPP),
    ),
    "cssegmentation ASPPHead": _aspp(
        "one norm over all branches; pooling: two layers, added to the projection before its norm",
        _csseg,
    ),
    "nemotron-ocr ASPP": _aspp(
        "rates 1 to 64, no 1x1; pooling has a bias and no norm, and is expanded",
        lambda: nemotron.ASPP(16, 8),
    ),
    "nemotron-ocr ASPP, residual": _aspp(
        "adds its input, for as many channels come out",
        lambda: nemotron.ASPP(8, 8),
        ((2, 8, 13, 15),),
    ),
    "mmdet ASPP": _aspp(
        "biases, no norms, no projection; the last 1x1 reads the pooled map; F.relu_",
        lambda: mmdet.ASPP(16, 8),
    ),
    "onedl-mmsegmentation ASPPHead": _aspp(
        MM_ASPP, lambda: mmseg_aspp.ASPPHead((1, *RATES), in_channels=16, **MM), ONE, True
    ),
    "onedl-mmsegmentation DepthwiseSeparableASPPHead": _aspp(
        MM_ASPP + "; norm and ReLU behind depthwise",
        lambda: mmseg_separable.DepthwiseSeparableASPPHead(
            0, 0, dilations=(1, *RATES), in_channels=16, **MM
        ),
        ONE,
        True,
    ),
    "onedl-mmsegmentation DepthwiseSeparableASPPHead, c1": _aspp(
        MM_ASPP + "; a decoder of the first map",
        lambda: mmseg_separable.DepthwiseSeparableASPPHead(
            8, 4, dilations=(1, *RATES), in_channels=16, in_index=1, **MM
        ),
        ((2, 8, 25, 29), MAP),
        True,
    ),
    "terratorch ASPPHead": _aspp(
        "pooling first; the projection is 3x3; branches in a list module",
        lambda: terratorch.ASPPHead((1, *RATES), 16, 8),
        ONE,
        True,
    ),
    "terratorch ASPPSegmentationHead": _aspp(
        MM_ASPP, lambda: terratorch.ASPPSegmentationHead([16], (1, *RATES), 16, 8), ONE, True
    ),
    "super-gradients ASPP": _aspp(
        "no pooling, no projection", lambda: super_context.ASPP(16, list(RATES))
    ),
    "super-gradients ASPP, biases": _aspp(
        "biases before the norms; no pooling, no projection",
        lambda: super_context.ASPP(16, list(RATES), in_out_ratio=2.0, use_bias=True),
    ),
    "pymic ASPPBlock": _aspp(
        BARE + "; widths differ",
        lambda: pymic_cnn.ASPPBlock(16, [4, 4, 6, 6], [1, 3, 3, 3], [1, 2, 4, 6]),
    ),
    "pymic ASPPBlock, net2d": _aspp(
        BARE, lambda: pymic_net2d.ASPPBlock(16, [4] * 4, [1, 3, 3, 3], [1, 2, 4, 6])
    ),
    "monai SimpleASPP": _aspp(BARE, lambda: monai_aspp.SimpleASPP(2, 16, 4)),
    "monai SimpleASPP, instance norm, PReLU": _aspp(
        "the projection's norm has no parameters, its activation has one",
        lambda: monai_aspp.SimpleASPP(2, 16, 4, norm_type="INSTANCE", acti_type="PRELU", bias=True),
    ),
    "monai SimpleASPP, rate 1": _aspp(
        "1x1 twice and 3x3 of rate 1; no norm or activation at all",
        lambda: monai_aspp.SimpleASPP(2, 16, 4, (1, 1, 3, 3), (1, 1, 1, 3), None, None),
    ),
    "monai SimpleASPP, 3-D": _aspp(BARE, lambda: monai_aspp.SimpleASPP(3, 16, 4), VOLUME),
    "monai Daf3dASPP": _aspp(
        "Conv3d, all 3x3x3, rates of each axis; GroupNorm and no activation in branches",
        lambda: monai_daf.Daf3dASPP(
            3, 16, 8, 8, (3,) * 4, DAF_RATES, ("GROUP", {"num_groups": 2, "num_channels": 8}), None
        ),
        VOLUME,
    ),
    "segmentation-models-pytorch-3d ASPP": _aspp(
        "Conv3d; trilinear", lambda: smp_3d.ASPP(16, 8, RATES), VOLUME
    ),
    "segmentation-models-pytorch-3d ASPP, separable": _aspp(
        "Conv3d; trilinear; " + SEPARABLE, lambda: smp_3d.ASPP(16, 8, RATES, True), VOLUME
    ),
    "transformers MobileViTASPP": _aspp(NAMED, lambda: _mobilevit_v1("MobileViTASPP")),
    "transformers MobileViTV2ASPP": _aspp(NAMED, lambda: _mobilevit_v2("MobileViTV2ASPP")),
    "transformers MobileViTDeepLabV3": _aspp(
        "reads the last map of a list", lambda: _mobilevit_v1("MobileViTDeepLabV3"), ONE, True
    ),
    "transformers MobileViTV2DeepLabV3": _aspp(
        "reads the last map of a list", lambda: _mobilevit_v2("MobileViTV2DeepLabV3"), ONE, True
    ),
    "transformers MobileNetV2DeepLabV3Plus": _aspp(
        "pooling first, one 1x1, no rate at all; 256 channels; align_corners; F.pad by its size",
        _mobilenet,
    ),
    # what only looks like one
    "torchvision LRASPP": _like("a map times its pooling; a dict comes out", _lraspp),
    "segmentation_models_pytorch PSPModule": _like(POOLS, lambda: smp_psp.PSPModule(16)),
    "segmentation_models_pytorch PSPModule, UPerNet": _like(
        POOLS, lambda: smp_upernet.PSPModule(16, 8)
    ),
    "torch-encoding PyramidPooling": _like(
        POOLS, lambda: encoding_nn.PyramidPooling(16, nn.BatchNorm2d, UP)
    ),
    "pytorchcv PyramidPooling": _like(POOLS, lambda: pytorchcv_psp.PyramidPooling(16, None)),
    "sssegmentation PyramidPoolingModule": _like(
        POOLS, lambda: ssseg_psp.PyramidPoolingModule(16, 8, (1, 2, 3, 6), False, BN_2D, RELU)
    ),
    "transformers UperNetPyramidPoolingModule": _like(
        "a list of poolings",
        lambda: upernet.UperNetPyramidPoolingModule((1, 2, 3, 6), 16, 8, False),
    ),
    "super-gradients SPPM": _like("a sum", lambda: super_context.SPPM(16, 8, 8, [1, 2, 4])),
    "super-gradients DAPPM": _like(
        "each pooling adds the one before",
        lambda: super_ddrnet.DAPPM(16, 8, 8, [1, 5, 9, 17, 0], [1, 2, 4, 8, 0]),
    ),
    "onedl-mmsegmentation PSPHead": _like(
        POOLS, lambda: mmseg_psp.PSPHead(in_channels=16, **MM), ONE, True
    ),
    "onedl-mmsegmentation UPerHead": _like(
        POOLS + "; a feature pyramid",
        lambda: mmseg_uper.UPerHead(in_channels=[8, 12, 16], in_index=[0, 1, 2], **MM),
        LEVELS,
        True,
    ),
    "onedl-mmsegmentation DAPPM": _like(
        "each pooling adds the one before", lambda: mmseg_utils.DAPPM(16, 8, 8, 5)
    ),
    "onedl-mmsegmentation PAPPM": _like(
        "poolings side by side, one grouped 3x3", lambda: mmseg_utils.PAPPM(16, 8, 8, 5)
    ),
    "onedl-mmsegmentation MSCAAttention": _like(
        "SegNeXt: depthwise strips, added", lambda: mmseg_mscan.MSCAAttention(16)
    ),
}
REAL = {name: row._replace(package=name.split()[0]) for name, row in _ROWS.items()}
