// SPDX-License-Identifier: BSD-3-Clause
// Compiled once per instruction set; ASPP_ISA names the namespace and the table.
#include "kernels.h"

#include "backward.h"
#include "channel_sums.h"
#include "checksum.h"
#include "energies.h"
#include "forward.h"
#include "polyphase.h"
#include "polyphase_grad_weight.h"
#include "polyphase_weights.h"

namespace aspp::ASPP_ISA {
namespace {

template <typename F>
auto with_compute_type(bool double_precision, F&& body) {
  return double_precision ? body(double{}) : body(float{});
}

#if defined(__AVX512BF16__)
constexpr bool kBFloat16Products = true;
#else
constexpr bool kBFloat16Products = false;
#endif

// body(T, E): what is computed in and what is multiplied
template <typename F>
auto with_forward_types(const PyramidParams& p, bool double_precision, F&& body) {
  if constexpr (kBFloat16Products) {
    if (p.x.dtype == Dtype::kBFloat16) return body(float{}, BFloat16{});
  }
  return double_precision ? body(double{}, double{}) : body(float{}, float{});
}

int64_t forward_scratch(const PyramidParams& p, bool double_precision) {
  return with_forward_types(p, double_precision, [&](auto t, auto e) {
    return lay_out_forward<decltype(t), decltype(e)>(p, nullptr).bytes;
  });
}

void forward_chunk(const PyramidParams& p, int64_t n, int64_t chunk, const Run* runs,
                   int64_t run_count, void* scratch, bool double_precision) {
  with_forward_types(p, double_precision, [&](auto t, auto e) {
    ChunkForward<decltype(t), decltype(e)>(p, n, chunk, runs, run_count, scratch).run();
  });
}

int64_t backward_scratch(const SeparableBackwardParams& p, bool double_precision) {
  return with_compute_type(double_precision,
                           [&](auto t) { return lay_out_backward<decltype(t)>(p, nullptr).bytes; });
}

void backward_block(const SeparableBackwardParams& p, int64_t channel, void* scratch,
                    bool double_precision) {
  with_compute_type(double_precision,
                    [&](auto t) { BlockBackward<decltype(t)>(p, channel, scratch).run(); });
}

void to_pixels(const Image& x, int64_t n, int64_t channels, int64_t width, int64_t first,
               int64_t last, void* dst, Dtype dst_dtype, int64_t stride) {
  with_compute_type(x.dtype == Dtype::kFloat64, [&](auto t) {
    using T = decltype(t);
    with_storage(x.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      const auto write = [&](auto* to) {
        for (int64_t y = first; y < last; ++y) {
          load_row<T>(plane_of<S>(x, n, 0), y, 0, width, channels, padded(channels),
                      to + (y - first) * width * stride, stride);
        }
      };
      if constexpr (!kMatches<T, S>) {
        return;
      } else if (dst_dtype == Dtype::kBFloat16) {
        if constexpr (sizeof(S) == 2) write(static_cast<BFloat16*>(dst));
      } else {
        write(static_cast<T*>(dst));
      }
    });
  });
}

void from_pixels(const void* rows, int64_t stride, int64_t count, int64_t channels,
                 const Image& out, bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    using T = decltype(t);
    with_storage(out.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        store_row<T>(static_cast<const T*>(rows), stride, channels, plane_of<S>(out, 0, 0), 0, 0,
                     count);
      }
    });
  });
}

void finish_rows(const FinishParams& p, int64_t n, int64_t first, int64_t last, void* scratch,
                 bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    using T = decltype(t);
    T* row = static_cast<T*>(scratch);
    const T* bias = static_cast<const T*>(p.bias) + n * p.raw_stride;
    for (int64_t y = first; y < last; ++y) {
      const T* raw = static_cast<const T*>(p.raw) + (n * p.height + y) * p.width * p.raw_stride;
      for (int64_t x = 0; x < p.width; ++x) {
        for (int64_t c = 0; c < p.raw_stride; c += kLanes<T>) {
          const int64_t at = x * p.raw_stride + c;
          const Vec<T> v = load(raw + at) + load(bias + c);
          store(row + at, p.relu ? at_least<T>(v, Vec<T>{}) : v);
        }
      }
      with_storage(p.out.dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        if constexpr (kMatches<T, S>) {
          store_row<T>(row, p.raw_stride, p.channels, plane_of<S>(p.out, n, 0), y, 0, p.width);
        }
      });
    }
  });
}

int64_t polyphase_scratch(const PolyphaseChunk& chunk, bool double_precision) {
  return with_compute_type(double_precision, [&](auto t) {
    return lay_out_polyphase<decltype(t)>(chunk, nullptr).bytes;
  });
}

void polyphase_forward(const PolyphaseParams& p, const PolyphaseChunk& chunk, void* scratch,
                       bool double_precision) {
  with_compute_type(double_precision,
                    [&](auto t) { PolyphaseForward<decltype(t)>(p, chunk, scratch).run(); });
}

int64_t polyphase_grad_weight_scratch(const PolyphaseGradWeight& p, int64_t panel_count,
                                      bool double_precision) {
  return with_compute_type(double_precision, [&](auto t) {
    return lay_out_grad_weight<decltype(t)>(p, panel_count, nullptr).bytes;
  });
}

void polyphase_grad_weight(const PolyphaseGradWeight& p, int64_t channel, int64_t panel,
                           int64_t panel_count, void* scratch, bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    GradWeight<decltype(t)>(p, channel, panel, panel_count, scratch).run();
  });
}

void combine_taps(const MinimalWeights& w, int64_t panel, int64_t first, int64_t last, void* to,
                  bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    combine_panel(w, panel, first, last, static_cast<decltype(t)*>(to));
  });
}

void pixel_energies(const Image& x, int64_t n, int64_t channels, int64_t width, int64_t first,
                    int64_t last, double* to, bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    using T = decltype(t);
    with_storage(x.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        plane_energies<T, S>(x, n, channels, width, first, last, to);
      }
    });
  });
}

void channel_sums(const void* a, const void* b, const double* centre, int64_t pixels,
                  int64_t channels, double* sums, double* products, bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    using T = decltype(t);
    add_channel_sums(static_cast<const T*>(a), static_cast<const T*>(b), centre, pixels, channels,
                     sums, products);
  });
}

void channel_affine(const void* a, const void* b, const void* const (&vectors)[4], int64_t pixels,
                    int64_t channels, void* to, bool double_precision) {
  with_compute_type(double_precision, [&](auto t) {
    using T = decltype(t);
    const auto vector = [&](int i) { return static_cast<const T*>(vectors[i]); };
    write_channel_affine(static_cast<const T*>(a), static_cast<const T*>(b), vector(0), vector(1),
                         vector(2), vector(3), pixels, channels, static_cast<T*>(to));
  });
}

}  // namespace

#define ASPP_STRING_OF(name) #name
#define ASPP_STRING(name) ASPP_STRING_OF(name)

extern const Kernels table;
const Kernels table{ASPP_STRING(ASPP_ISA),
                    kBFloat16Products,
                    forward_scratch,
                    forward_chunk,
                    backward_scratch,
                    kBackwardChannels,
                    backward_block,
                    to_pixels,
                    from_pixels,
                    finish_rows,
                    polyphase_scratch,
                    polyphase_forward,
                    kGradBlock,
                    polyphase_grad_weight_scratch,
                    polyphase_grad_weight,
                    combine_taps,
                    checksum,
                    pixel_energies,
                    channel_sums,
                    channel_affine};

}  // namespace aspp::ASPP_ISA
