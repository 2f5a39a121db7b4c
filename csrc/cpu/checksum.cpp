// SPDX-License-Identifier: BSD-3-Clause
// CPU binding of checksums: whether parameters still are what they were, however they are written.
#include <torch/csrc/stable/library.h>

#include "../operator_results.h"
#include "kernels/kernels.h"
#include "parallel.h"

namespace aspp {
namespace {

constexpr int64_t kPiece = 256 << 10;  // bytes of one task: no result depends on the threads

struct Piece {
  const char* data;
  int64_t bytes;
};

bool is_dense(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 4 && is_channels_last(t));
}

Tensor checksums(std::vector<Tensor> tensors) {
  std::vector<Piece> pieces;
  std::vector<size_t> end;  // of each tensor's pieces
  std::vector<Tensor> copies;
  for (const Tensor& t : tensors) {
    check_memory("checksums", entry("tensors", copies.size()), t);
    copies.push_back(is_dense(t) ? t
                                 : with_memory(t, [&] { return torch::stable::contiguous(t); }));
    const char* data = static_cast<const char*>(copies.back().data_ptr());
    const int64_t bytes = t.numel() * int64_t(t.element_size());
    for (int64_t at = 0; at < bytes; at += kPiece) {
      pieces.push_back({data + at, std::min(kPiece, bytes - at)});
    }
    end.push_back(pieces.size());
  }
  std::vector<uint64_t> sums(pieces.size());
  run_tasks(int64_t(pieces.size()), 0, [&](int64_t i, void*) {
    sums[size_t(i)] = kernels().checksum(pieces[size_t(i)].data, pieces[size_t(i)].bytes, 0);
  });
  const int64_t count[] = {int64_t(tensors.size())};
  const Tensor result = torch::stable::empty({count, 1}, ScalarType::Long);
  uint64_t* to = static_cast<uint64_t*>(result.data_ptr());
  for (size_t i = 0, piece = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    std::vector<uint64_t> words{uint64_t(t.scalar_type()), uint64_t(t.dim())};
    for (int64_t d = 0; d < t.dim(); ++d) {
      words.insert(words.end(), {uint64_t(t.size(d)), uint64_t(t.stride(d))});
    }
    for (; piece < end[i]; ++piece) words.push_back(sums[piece]);
    to[i] = kernels().checksum(reinterpret_cast<const char*>(words.data()),
                               int64_t(words.size() * sizeof(uint64_t)), 1);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) { m.impl("checksums", ASPP_BOX(&checksums)); }

}  // namespace aspp
