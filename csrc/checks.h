// SPDX-License-Identifier: BSD-3-Clause
// What every binding asks of its tensors. The sentences are those of aspp_ext/ops/checks.py; the
// tests hold the two together.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace aspp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kMaxElements = int64_t(1) << 48;
inline constexpr int64_t kMaxRate = (int64_t(1) << 31) - 1;  // taps * rate stays far from overflow

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

template <typename... Parts>
void require(bool rule, const Parts&... parts) {
  if (!rule) refuse(parts...);
}

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline std::string shape_of(const Tensor& t) {
  return shape_of(std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    default: return "dtype " + std::to_string(int(dtype));
  }
}

inline std::string device_name(const Tensor& t) {
  using torch::headeronly::DeviceType;
  const auto device = t.device();
  const std::string type = device.type() == DeviceType::CPU    ? "cpu"
                           : device.type() == DeviceType::CUDA ? "cuda"
                           : device.type() == DeviceType::Meta ? "meta"
                                                               : "another device";
  return device.index() < 0 ? type : type + ":" + std::to_string(device.index());
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// PyTorch's rule for "these strides are channels_last".
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d);
    if (t.size(d) > 1) least *= t.size(d);
  }
  return true;
}

// Shapes of a pyramid, after its checks.
struct PyramidShape {
  int64_t batch = 0, channels = 0, height = 0, width = 0, out_channels = 0;
};

// Offsets are 64 bits wide; sizes that no memory holds (strides of 0 make them legal) stop here,
// long before a product of them could wrap.
inline void check_size(const char* op, const std::string& name, std::vector<int64_t> sizes) {
  int64_t count = 1;
  bool fits = true;
  for (const int64_t size : sizes) {
    if (size == 0) return;
    fits = fits && !__builtin_mul_overflow(count, size, &count) && count <= kMaxElements;
  }
  require(
      fits, op, ": ", name,
      " must fit in memory: at most 2^48 elements (DefaultCPUAllocator: can't allocate memory)");
}

// [N, C, H, W]
inline void check_image_size(const char* op, const char* name, const std::vector<int64_t>& sizes) {
  require(sizes[1] >= 1 && sizes[2] >= 1 && sizes[3] >= 1, op, ": ", name,
          " needs at least one channel, row and column, got shape ", shape_of(sizes));
  // the batch may be 0, but a plane of any size is still walked
  check_size(op, name, {std::max<int64_t>(sizes[0], 1), sizes[1], sizes[2], sizes[3]});
}

// That t is strided and that its storage holds what sizes and strides reach, in PyTorch's words: a
// storage may have been freed or cut since. Each tensor passes here before its data is read.
void check_memory(const char* op, const std::string& name, const Tensor& t);

inline void check_image(const char* op, const char* name, const Tensor& x) {
  require(x.dim() == 4, op, ": ", name, " must be [N, C, H, W], got shape ", shape_of(x));
  require(is_supported(x.scalar_type()), op, ": ", name,
          " must be float32, float64, bfloat16 or float16, got ", dtype_name(x.scalar_type()));
  check_image_size(op, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_memory(op, name, x);
}

inline void check_device(const char* op, const std::string& name, const Tensor& t,
                         const Tensor& x) {
  require(t.device() == x.device(), op, ": ", name, " must be on x's device ", device_name(x),
          ", got ", device_name(t));
  check_memory(op, name, t);
}

inline void check_like(const char* op, const std::string& name, const Tensor& t, const Tensor& x) {
  require(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have x's dtype ",
          dtype_name(x.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  check_device(op, name, t, x);
}

// What stands for None in a list of tensors: one of shape [0].
inline bool is_none(const Tensor& t) { return t.dim() == 1 && t.size(0) == 0; }

inline std::string entry(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

inline void check_odd(const char* op, const std::string& name, int64_t kh, int64_t kw) {
  require(kh % 2 == 1 && kw % 2 == 1, op, ": ", name, " must have odd kernel sizes, got ", kh, "x",
          kw);
}

inline void check_kernel(const char* op, const std::string& name, const Tensor& w) {
  require(w.dim() == 4, op, ": ", name, " must be [O, C, kh, kw], got shape ", shape_of(w));
  check_odd(op, name, w.size(2), w.size(3));
  require(w.size(0) >= 1, op, ": ", name, " needs at least one output channel, got shape ",
          shape_of(w));
  check_size(op, name, {w.size(0), w.size(1), w.size(2), w.size(3)});
}

inline void check_polyphase(const char* op, int64_t polyphase) {
  require(polyphase >= 0 && polyphase <= 2, op,
          ": polyphase must be 0 (never), 1 (where it costs less) or 2 (wherever it can), got ",
          polyphase);
}

// rates: (rate_h, rate_w) of every branch.
inline void check_rates(const char* op, const std::vector<int64_t>& rates, size_t branches) {
  require(branches >= 1, op, ": weights must hold at least one branch, got an empty list");
  require(rates.size() == 2 * branches, op, ": atrous_rates must have one rate per branch, got ",
          rates.size() / 2, " for ", branches, " branches");
  for (size_t i = 0; i < rates.size(); ++i) {
    require(rates[i] >= 1, op, ": ", entry("atrous_rates", i / 2), " must be >= 1, got ", rates[i]);
    require(rates[i] <= kMaxRate, op, ": ", entry("atrous_rates", i / 2), " must be <= ", kMaxRate,
            ", got ", rates[i]);
  }
}

inline void check_vector(const char* op, const char* name, const std::optional<Tensor>& v,
                         const Tensor& x, int64_t channels, bool per_sample = false) {
  if (!v.has_value()) return;
  check_like(op, name, *v, x);
  const bool rows =
      per_sample && v->dim() == 2 && v->size(0) == x.size(0) && v->size(1) == channels;
  require(rows || (v->dim() == 1 && v->size(0) == channels), op, ": ", name,
          " must have one value per output channel (", channels, "), got shape ", shape_of(*v));
}

}  // namespace aspp
