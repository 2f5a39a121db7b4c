// SPDX-License-Identifier: BSD-3-Clause
#include "operands.h"

#include "launch.h"

namespace aspp::cuda {
namespace {

// Two dimensions as one: `outer` steps of `outer_step`, each of `inner` steps of `step`.
struct Merged {
  int64_t count = 0;
  int64_t step = 0;
  bool possible = true;
};

// Steps along a dimension of one element are never taken, whatever the tensor says they are: it may
// say what no sum of bytes can hold.
int64_t step(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; }

Merged merge(int64_t outer, int64_t outer_step, int64_t inner, int64_t inner_step) {
  if (outer == 1) return {inner, inner == 1 ? 1 : inner_step};
  if (inner == 1) return {outer, outer_step};
  return {outer * inner, inner_step, outer_step == inner * inner_step};
}

Merged plane_of(const Tensor& t) { return merge(t.size(2), t.stride(2), t.size(3), t.stride(3)); }

bool starts_chunk(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

// The step from row to row where `t` lies as [rows, C] with rows of one length; 0 where it does
// not. Rows: the pixels of all images, or the taps of all output channels.
int64_t pitch_of(const Tensor& t) {
  const Merged plane = plane_of(t);
  if (!plane.possible || (t.size(1) > 1 && t.stride(1) != 1)) return 0;
  const Merged rows = merge(t.size(0), t.stride(0), plane.count, plane.step);
  if (!rows.possible) return 0;
  return rows.count == 1 ? t.size(1) : rows.step;
}

Tensor channels_last_copy(const Tensor& t) {
  return with_memory(t, [&] {
    return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
  });
}

int64_t plane_size(const Tensor& t) { return t.size(2) * t.size(3); }

}  // namespace

void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the caller has it; the next check of another's call must not find it
  refuse(op, ": CUDA answered \"", cudaGetErrorString(error), "\"");
}

Operands::Operands(const char* op, const Tensor& like, Math math)
    : op_(op),
      like_(like),
      math_(math),
      bytes_(bytes_of(math)),
      chunk_(chunk_of(math)),
      stream_(like) {}

int64_t Operands::padded(int64_t channels) const {
  return (channels + chunk_ - 1) / chunk_ * chunk_;
}

int32_t Operands::narrow(const char* what, int64_t value) const {
  require(value <= kMostCounted, op_, ": ", what, " must be at most ", kMostCounted,
          " on CUDA, got ", value);
  return int32_t(value);
}

// The kernels multiply it in 32 bits.
int32_t Operands::narrow_pitch(const Rows& rows) const {
  require(rows.pitch <= INT32_MAX / bytes_, op_,
          ": from pixel to pixel there must be less than 2^31 bytes on CUDA, got ",
          rows.pitch * bytes_);
  return int32_t(rows.pitch);
}

Tensor Operands::keep(const Tensor& t) {
  storage_.push_back(t);
  return t;
}

void* Operands::allocate(int64_t bytes) { return keep(stream_.allocate(like_, bytes)).data_ptr(); }

Rows Operands::allocate_rows(int64_t rows, int64_t channels) {
  const int64_t pitch = padded(channels);
  check_size(op_, "an operand", {rows, pitch});
  return {allocate(rows * pitch * bytes_), pitch};
}

void Operands::transpose(TransposeParams params) {
  params.bytes = int32_t(bytes_);
  check_cuda(op_, launch_transpose_sm80(params, stream()));
}

// Channels [first, first + count) of every pixel to rows at `to`.
void Operands::pack_image(const Tensor& t, int64_t first, int64_t count, char* to, int64_t pitch) {
  const Merged plane = plane_of(t);
  if (!plane.possible) return pack_image(keep(channels_last_copy(t)), first, count, to, pitch);
  TransposeParams params{};
  params.in = static_cast<const char*>(t.data_ptr()) + first * step(t, 1) * bytes_;
  params.in_batch = step(t, 0);
  params.in_row = step(t, 1);
  params.in_column = plane.step;
  params.out = to;
  params.out_batch = plane.count * pitch;
  params.out_pitch = pitch;
  params.batch = t.size(0);
  params.rows = count;
  params.columns = plane.count;
  params.out_columns = padded(count);
  transpose(params);
}

Rows Operands::image(const Tensor& t) {
  const int64_t pitch = pitch_of(t);
  if (starts_chunk(t) && t.size(1) % chunk_ == 0 && pitch >= t.size(1) && pitch % chunk_ == 0 &&
      pitch <= INT32_MAX / bytes_)  // a kernel's pitch has 32 bits
    return {t.data_ptr(), pitch};
  const Rows rows = allocate_rows(t.size(0) * plane_size(t), t.size(1));
  pack_image(t, 0, t.size(1), static_cast<char*>(rows.data), rows.pitch);
  return rows;
}

Rows Operands::branch_image(const Tensor& t, const std::vector<int64_t>& channels,
                            std::vector<int64_t>& first) {
  int64_t sum = 0;
  for (const int64_t count : channels) {
    first.push_back(sum);
    sum += padded(count);
  }
  if (sum == t.size(1)) return image(t);
  const Rows rows = allocate_rows(t.size(0) * plane_size(t), sum);
  const Tensor source = plane_of(t).possible ? t : keep(channels_last_copy(t));
  for (int64_t b = 0, from = 0; b < int64_t(channels.size()); from += channels[b++])
    pack_image(source, from, channels[b], static_cast<char*>(rows.data) + first[b] * bytes_,
               rows.pitch);
  return rows;
}

const void* Operands::weight(const Tensor& w) {
  const int64_t taps = plane_size(w), channels = w.size(1), pitch = padded(channels);
  if (starts_chunk(w) && pitch == channels && pitch_of(w) == pitch) return w.data_ptr();
  const Merged plane = plane_of(w);
  if (!plane.possible) return weight(keep(channels_last_copy(w)));
  const Rows rows = allocate_rows(w.size(0) * taps, channels);
  TransposeParams params{};
  params.in = w.data_ptr();
  params.in_batch = step(w, 0);
  params.in_row = step(w, 1);
  params.in_column = plane.step;
  params.out = rows.data;
  params.out_batch = taps * pitch;
  params.out_pitch = pitch;
  params.batch = w.size(0);
  params.rows = channels;
  params.columns = taps;
  params.out_columns = pitch;
  if (taps == 1) {  // one large transpose instead of many of one column
    params.in_column = step(w, 0);
    std::swap(params.batch, params.columns);
  }
  transpose(params);
  return rows.data;
}

const void* Operands::vector(const Tensor& v) {
  return keep(with_memory(v, [&] { return torch::stable::contiguous(v); })).data_ptr();
}

Rows Operands::image_target(const Tensor& out) {
  const int64_t pixels = out.size(0) * plane_size(out);
  return pitch_of(out) == out.size(1) ? Rows{out.data_ptr(), out.size(1)}
                                      : allocate_rows(pixels, out.size(1));
}

void Operands::deliver(const Rows& rows, const Tensor& out) {
  if (rows.data == out.data_ptr()) return;
  const int64_t plane = plane_size(out);
  TransposeParams params{};
  params.in = rows.data;
  params.in_batch = plane * rows.pitch;
  params.in_row = rows.pitch;
  params.in_column = 1;
  params.out = out.data_ptr();
  params.out_batch = out.size(1) * plane;
  params.out_pitch = plane;
  params.batch = out.size(0);
  params.rows = params.out_columns = plane;
  params.columns = out.size(1);
  transpose(params);
}

Rows Operands::weight_target(const Tensor& out) {
  const bool in_place = plane_size(out) == 1 && out.size(1) % chunk_ == 0;
  return in_place ? Rows{out.data_ptr(), out.size(1)}
                  : allocate_rows(out.size(0) * plane_size(out), out.size(1));
}

}  // namespace aspp::cuda
