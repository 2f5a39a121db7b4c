// SPDX-License-Identifier: BSD-3-Clause
// Backward of the separable pyramid for one block of channels. Channels never mix in the depthwise
// half, so a block owns its slice of every gradient: no races, and a fixed order of every sum.
//
// With D = depthwise(x), a = relu(scale * D + shift) or D, and h = pointwise^T grad:
//   grad_pointwise = grad a^T      h' = scale * [scale * D + shift > 0] * h
//   grad_depthwise[t] = sum_q h'[q] x[q + t]        grad_x = sum over branches of depthwise^T(h')
#pragma once

#include <type_traits>

#include "cascade.h"
#include "depthwise.h"
#include "gemm.h"
#include "params.h"
#include "pixels.h"
#include "scratch.h"

namespace aspp::ASPP_ISA {

inline constexpr int64_t kBackwardChannels = 64;

template <typename T>
struct BackwardScratch {
  T* x;          // [H * W, stride]
  T* depthwise;  // [H * W, stride]
  T* h;          // [H * W, stride]
  T* grad_x;     // [H * W, stride]
  T* pointwise;  // [max O, stride]
  int64_t bytes;
};

template <typename T>
BackwardScratch<T> lay_out_backward(const SeparableBackwardParams& p, void* memory) {
  int64_t most = 0;
  for (int64_t b = 0; b < p.branch_count; ++b) {
    if (p.branches[b].out_channels > most) most = p.branches[b].out_channels;
  }
  const int64_t plane = p.height * p.width * kBackwardChannels;
  Buffers<T> buffers(memory);
  BackwardScratch<T> s{};
  s.x = buffers.take(plane);
  s.depthwise = buffers.take(plane);
  s.h = buffers.take(plane);
  s.grad_x = buffers.take(plane);
  s.pointwise = buffers.take(most * kBackwardChannels);
  s.bytes = buffers.bytes();
  return s;
}

template <typename T>
class BlockBackward {
 public:
  BlockBackward(const SeparableBackwardParams& p, int64_t channel, void* scratch)
      : p_(p),
        c_(channel),
        s_(lay_out_backward<T>(p, scratch)),
        pixels_(p.height * p.width) {
    channels_ = p.channels - c_ < kBackwardChannels ? p.channels - c_ : kBackwardChannels;
    stride_ = padded(channels_);
  }

  void run() {
    clear();
    for (int64_t n = 0; n < p_.batch; ++n) {
      load_rows(p_.x, n, s_.x);
      if (p_.grad_x.data != nullptr) {
        std::memset(s_.grad_x, 0, size_t(pixels_ * stride_) * sizeof(T));
      }
      for (int64_t b = 0; b < p_.branch_count; ++b) branch(b, n);
      if (p_.grad_x.data != nullptr) store_rows(n);
    }
  }

 private:
  using Sum = Cascade<T, kBackwardChannels>;

  T* output(void* const* list, int64_t b) const {
    return list == nullptr ? nullptr : static_cast<T*>(list[b]);
  }

  void clear() {
    const int64_t all = padded(p_.channels);
    const auto zero = [this](T* at, int64_t count) {
      if (at != nullptr) std::memset(at, 0, size_t(count) * sizeof(T));
    };
    for (int64_t b = 0; b < p_.branch_count; ++b) {
      const BranchParams& branch = p_.branches[b];
      const int64_t row = padded(branch.out_channels);
      if (T* at = output(p_.grad_pointwise, b)) zero(at + c_ * row, channels_ * row);
      if (T* at = output(p_.grad_depthwise, b)) {
        for (int64_t t = 0; t < branch.kernel_h * branch.kernel_w; ++t) {
          zero(at + t * all + c_, stride_);
        }
      }
      if (T* at = output(p_.grad_between_scale, b)) zero(at + c_, stride_);
      if (T* at = output(p_.grad_between_shift, b)) zero(at + c_, stride_);
    }
  }

  void load_rows(const Image& image, int64_t n, T* to) {
    with_storage(image.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane = plane_of<S>(image, n, c_);
        for (int64_t y = 0; y < p_.height; ++y) {
          load_row<T>(plane, y, 0, p_.width, channels_, stride_, to + y * p_.width * stride_,
                      stride_);
        }
      }
    });
  }

  void store_rows(int64_t n) {
    with_storage(p_.grad_x.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane = plane_of<S>(p_.grad_x, n, c_);
        for (int64_t y = 0; y < p_.height; ++y) {
          store_row<T>(s_.grad_x + y * p_.width * stride_, stride_, channels_, plane, y, 0,
                       p_.width);
        }
      }
    });
  }

  // [O, block] of the pointwise weights, whatever their format.
  void load_pointwise(int64_t b) {
    const Image& w = p_.pointwise[b];
    with_storage(w.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane{static_cast<S*>(w.data) + c_ * w.c_stride, w.c_stride, 0, w.n_stride};
        load_row<T>(plane, 0, 0, p_.branches[b].out_channels, channels_, stride_, s_.pointwise,
                    stride_);
      }
    });
  }

  DepthwiseRows<T> depthwise_of(const BranchParams& branch) const {
    DepthwiseRows<T> d{};
    d.weights = static_cast<const T*>(branch.depthwise) + c_;
    d.weight_stride = padded(p_.channels);
    d.kernel_h = branch.kernel_h;
    d.kernel_w = branch.kernel_w;
    d.rate_h = branch.rate_h;
    d.rate_w = branch.rate_w;
    d.height = p_.height;
    d.width = p_.width;
    d.channels = stride_;
    d.pixel_stride = stride_;
    return d;
  }

  void depthwise_plane(const DepthwiseRows<T>& d, const T* from, T* to) {
    for (int64_t y = 0; y < p_.height; ++y) {
      depthwise_row(
          d, y, 0, p_.width, [&](ptrdiff_t row) { return from + row * p_.width * stride_; },
          to + y * p_.width * stride_, stride_);
    }
  }

  void branch(int64_t b, int64_t n) {
    const BranchParams& branch = p_.branches[b];
    const T* grad = static_cast<const T*>(p_.grad) + n * pixels_ * p_.grad_stride + branch.column;
    T* grad_pointwise = output(p_.grad_pointwise, b);
    T* grad_depthwise = output(p_.grad_depthwise, b);
    const bool separable = branch.depthwise != nullptr;
    const bool between = branch.between_scale != nullptr;
    const bool need_h = p_.grad_x.data != nullptr || grad_depthwise != nullptr ||
                        output(p_.grad_between_scale, b) != nullptr ||
                        output(p_.grad_between_shift, b) != nullptr;
    if (need_h) {
      load_pointwise(b);
      gemm(Gemm<T>{grad, p_.grad_stride, 1, s_.pointwise, stride_, s_.h, stride_, pixels_, stride_,
                   branch.out_channels, false});
    }
    if (separable && (grad_pointwise != nullptr || between)) {
      depthwise_plane(depthwise_of(branch), s_.x, s_.depthwise);
    }
    if (between) through_between(b, need_h);
    if (grad_pointwise != nullptr) {
      constexpr int64_t block = 128;  // pixels whose rows of both operands stay in cache
      const int64_t row = padded(branch.out_channels);
      const T* a = separable ? s_.depthwise : s_.x;
      for (int64_t q = 0; q < pixels_; q += block) {
        gemm(Gemm<T>{a + q * stride_, 1, stride_, grad + q * p_.grad_stride, p_.grad_stride,
                     grad_pointwise + c_ * row, row, channels_, row,
                     pixels_ - q < block ? pixels_ - q : block, true});
      }
    }
    if (grad_depthwise != nullptr) tap_gradients(branch, grad_depthwise);
    if (p_.grad_x.data != nullptr) {
      if (separable) {
        DepthwiseRows<T> d = depthwise_of(branch);
        d.flipped = true;
        d.accumulate = true;
        depthwise_plane(d, s_.h, s_.grad_x);
      } else {
        for (int64_t i = 0; i < pixels_ * stride_; i += kLanes<T>) {
          store(s_.grad_x + i, load(s_.grad_x + i) + load(s_.h + i));
        }
      }
    }
  }

  // depthwise <- activated, h <- h' and the gradients of the affine map.
  void through_between(int64_t b, bool need_h) {
    const BranchParams& branch = p_.branches[b];
    T* grad_scale = output(p_.grad_between_scale, b);
    T* grad_shift = output(p_.grad_between_shift, b);
    for (int64_t v = 0; v < stride_; v += kLanes<T>) {
      const Vec<T> scale = load(static_cast<const T*>(branch.between_scale) + c_ + v);
      const Vec<T> shift = load(static_cast<const T*>(branch.between_shift) + c_ + v);
      Cascade<T, kLanes<T>> scale_sum(kLanes<T>), shift_sum(kLanes<T>);
      for (int64_t first = 0; first < pixels_; first += kStretch) {
        const int64_t last = pixels_ - first < kStretch ? pixels_ : first + kStretch;
        Vec<T> scale_part{}, shift_part{};
        for (int64_t q = first; q < last; ++q) {
          T* at = s_.depthwise + q * stride_ + v;
          const Vec<T> d = load(at);
          const Vec<T> u = d * scale + shift;
          store(at, branch.between_relu ? at_least<T>(u, Vec<T>{}) : u);
          if (!need_h) continue;
          Vec<T> h = load(s_.h + q * stride_ + v);
          if (branch.between_relu) h = u > Vec<T>{} ? h : Vec<T>{};
          scale_part += h * d;
          shift_part += h;
          store(s_.h + q * stride_ + v, h * scale);
        }
        scale_sum.add(scale_part);
        shift_sum.add(shift_part);
      }
      if (grad_scale != nullptr) scale_sum.add_to(grad_scale + c_ + v);
      if (grad_shift != nullptr) shift_sum.add_to(grad_shift + c_ + v);
    }
  }

  void tap_gradients(const BranchParams& branch, T* grad_depthwise) {
    const int64_t all = padded(p_.channels);
    for (int64_t t = 0; t < branch.kernel_h * branch.kernel_w; ++t) {
      const int64_t dy = (t / branch.kernel_w - branch.kernel_h / 2) * branch.rate_h;
      const int64_t dx = (t % branch.kernel_w - branch.kernel_w / 2) * branch.rate_w;
      const int64_t y0 = dy < 0 ? -dy : 0, y1 = dy > 0 ? p_.height - dy : p_.height;
      const int64_t x0 = dx < 0 ? -dx : 0, x1 = dx > 0 ? p_.width - dx : p_.width;
      if (x0 >= x1) continue;
      Sum sum(stride_);
      for (int64_t y = y0; y < y1; ++y) {
        add_row_product(s_.h + (y * p_.width + x0) * stride_,
                        s_.x + ((y + dy) * p_.width + x0 + dx) * stride_, x1 - x0, sum);
      }
      sum.add_to(grad_depthwise + t * all + c_);
    }
  }

  void add_row_product(const T* h, const T* x, int64_t count, Sum& sum) {
    for (int64_t q = 0; q < count; q += kStretch) {
      const int64_t length = count - q < kStretch ? count - q : kStretch;
      T* const to = sum.next();
      int64_t v = 0;
      for (; v + 4 * kLanes<T> <= stride_; v += 4 * kLanes<T>) {
        add_stretch<4>(h + q * stride_ + v, x + q * stride_ + v, length, to + v);
      }
      for (; v < stride_; v += kLanes<T>) {
        add_stretch<1>(h + q * stride_ + v, x + q * stride_ + v, length, to + v);
      }
    }
  }

  template <int kVectors>
  void add_stretch(const T* h, const T* x, int64_t count, T* to) {
    Vec<T> sum[kVectors] = {};
    for (int64_t q = 0; q < count; ++q) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = q * stride_ + j * kLanes<T>;
        sum[j] += load(h + at) * load(x + at);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      store(to + j * kLanes<T>, load(to + j * kLanes<T>) + sum[j]);
    }
  }

  const SeparableBackwardParams& p_;
  const int64_t c_;
  BackwardScratch<T> s_;
  const int64_t pixels_;
  int64_t channels_ = 0, stride_ = 0;
};

}  // namespace aspp::ASPP_ISA
