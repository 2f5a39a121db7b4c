// SPDX-License-Identifier: BSD-3-Clause
#include "minimal.h"

#include <bit>
#include <span>
#include <tuple>

#include "print.h"

namespace aspp::plan {
namespace {

constexpr Index kPiece = 8;  // positions of a piece, at most

// Of blocks; of equally good ones the first is taken.
enum Kind { triple, overlapped, pair, one };
constexpr Kind kKinds[] = {triple, overlapped, pair, one};

constexpr std::array<double, 3> kWeights[] = {
    {1, 0, 0},
    {0, 1, 0},
    {0, 0, 1},
    // pair
    {0.09375, -0.0625, -0.03125},
    {-0.03125, -0.0625, 0.09375},
    // triple
    {0.375, 0.1875, -0.375},
    {-0.375, 0.1875, 0.375},
    {0.125, -0.1875, 0.125},
    {0.125, 0.1875, 0.125},
    // overlapped
    {0.5, 0.5, 0.5},
    {0.5, -0.5, 0.5},
    {0.1875, 0.625, 0.1875},
};
constexpr int kFirstTap = 0;
constexpr int kCentreTap = 1;
constexpr int kLastTap = 2;

struct Product {
  int weight;
  std::array<double, 4> inputs;   // at the block's positions; overlapped: from the one before on
  std::array<double, 3> outputs;  // at the block's positions
};

constexpr Product kTriple[] = {
    {5, {2, -1, -2}, {2, 1, -2}},
    {6, {2, 1, -2}, {2, -1, -2}},
    {7, {-2, 3, -2}, {2, -3, 2}},
    {8, {2, 3, 2}, {2, 3, 2}},
};
constexpr Product kOverlapped[] = {
    {kFirstTap, {1, 0, -1}, {1}},
    {9, {0, 1, 1}, {1, 1}},
    {10, {0, -1, 1}, {1, -1}},
    {kLastTap, {0, 1, 0, -1}, {0, -1}},
};
constexpr Product kPair[] = {
    {11, {1, 1}, {1, 1}},
    {3, {-3, 1}, {1, -3}},
    {4, {-1, 3}, {3, -1}},
};
constexpr Product kOne[] = {{kCentreTap, {1}, {1}}};

constexpr std::span<const Product> kProducts[] = {kTriple, kOverlapped, kPair, kOne};
constexpr Index kSizes[] = {3, 2, 2, 1};

using Allowed = std::array<bool, std::size(kKinds)>;
using WeightSet = unsigned;  // a bit for each of kWeights

struct Block {
  Kind kind = one;
  Index at = 0;
};

// How a block's output gets its neighbour's input: within an overlapped block's own products, from
// a product that the neighbour computes too, or from one of its own.
enum class Coupling { none, shared, own };

Coupling to_right(Kind left, Block right) {
  if (right.kind == overlapped) return Coupling::none;
  const bool begins = right.at == kSizes[overlapped];
  return left == overlapped && begins ? Coupling::shared : Coupling::own;
}

Coupling to_left(Kind left, Block right, Index length) {
  if (left == overlapped) return Coupling::none;
  const bool ends = right.at + kSizes[overlapped] == length;
  return right.kind == overlapped && ends ? Coupling::shared : Coupling::own;
}

// The best cut of a sequence's first positions, of those whose last block has a certain kind.
struct Cut {
  Index products = INT64_MAX;
  WeightSet weights = 0;
  Index begin = 0;  // of the last block
  Kind left = one;  // the block before it

  bool exists() const { return products < INT64_MAX; }
  bool is_better_than(const Cut& other) const {
    return std::tuple(products, std::popcount(weights)) <
           std::tuple(other.products, std::popcount(other.weights));
  }
};

// `cut`, which ends with `left`, and one block more.
Cut extended(const Cut& cut, Kind left, Block right, Index length) {
  Cut result{cut.products, cut.weights, right.at, left};
  const auto pay = [&](int weight) {
    ++result.products;
    result.weights |= 1u << weight;
  };
  for (const Product& product : kProducts[right.kind]) pay(product.weight);
  if (right.at == 0) return result;
  if (to_right(left, right) == Coupling::own) pay(kFirstTap);
  if (to_left(left, right, length) == Coupling::own) pay(kLastTap);
  return result;
}

struct Sequence {
  Index length = 0;
  Index products = 0;
  std::vector<Block> blocks;
};

// A sequence cut into blocks, whose weights join those in use. A triple may reach a position beyond
// the end, which can save weights; any other block that did would save nothing.
Sequence best_cut(Index length, const Allowed& allowed, WeightSet& used) {
  std::vector<std::array<Cut, std::size(kKinds)>> best(length + 1);
  best[0][one] = {0, used};
  for (Index at = 0; at < length; ++at)
    for (const Kind right : kKinds) {
      if (!allowed[right] || at + std::min<Index>(kSizes[right], 2) > length) continue;
      Cut& end = best[std::min(at + kSizes[right], length)][right];
      for (const Kind left : kKinds) {
        if (!best[at][left].exists()) continue;
        const Cut found = extended(best[at][left], left, {right, at}, length);
        if (found.is_better_than(end)) end = found;
      }
    }
  Kind kind = triple;
  for (const Kind other : kKinds)
    if (best[length][other].is_better_than(best[length][kind])) kind = other;
  used = best[length][kind].weights;
  Sequence result{length, best[length][kind].products, {}};
  for (Index end = length; end > 0; end = result.blocks.back().at) {
    const Cut& cut = best[end][kind];
    result.blocks.push_back({kind, cut.begin});
    kind = cut.left;
  }
  std::reverse(result.blocks.begin(), result.blocks.end());
  return result;
}

// Those that are not zero, at positions from `first` on. Outside of the sequence inputs are zero
// and outputs unwanted.
template <std::size_t count>
std::vector<Term> terms(const std::array<double, count>& coefficients, double scale, Index first,
                        Index length) {
  std::vector<Term> result;
  for (Index at = first; const double coefficient : coefficients) {
    if (coefficient != 0 && at >= 0 && at < length) result.push_back({at, coefficient * scale});
    ++at;
  }
  return result;
}

// At the positions of the sequence, with kWeights for weights.
std::vector<MinimalProduct> products_of(const Sequence& sequence, Index denominator) {
  const Index length = sequence.length;
  const auto whole = static_cast<double>(denominator);
  std::vector<MinimalProduct> result;
  Kind left = one;
  for (const Block block : sequence.blocks) {
    const auto [kind, at] = block;
    const Index first = kind == overlapped ? at - 1 : at;
    const double scale = kind == triple ? whole / 3 : whole;
    for (const auto& [weight, inputs, outputs] : kProducts[kind])
      result.push_back(
          {weight, terms(inputs, 1, first, length), terms(outputs, scale, at, length)});
    if (at > 0) {
      // At the ends of the sequence, where an input of an overlapped block is zero, its first
      // product is -w0 * its last position and its last product w2 * its first position.
      const Coupling rightwards = to_right(left, block);
      const Coupling leftwards = to_left(left, block, length);
      if (leftwards == Coupling::shared) {
        std::vector<Term>& outputs = result.back().outputs;
        outputs.insert(outputs.begin(), {at - 1, whole});
      }
      if (rightwards == Coupling::shared) result.front().outputs.push_back({at, -whole});
      if (rightwards == Coupling::own) result.push_back({kFirstTap, {{at - 1, 1}}, {{at, whole}}});
      if (leftwards == Coupling::own) result.push_back({kLastTap, {{at, 1}}, {{at - 1, whole}}});
    }
    left = kind;
  }
  return result;
}

struct Piece {
  Interval positions;  // of a sequence
  std::vector<MinimalProduct> products;
};

// Cut where no product has outputs on both sides, as late as the size of a piece lets it.
std::vector<Piece> pieces_of(const Sequence& sequence, Index denominator) {
  const Index length = sequence.length;
  const std::vector<MinimalProduct> products = products_of(sequence, denominator);
  std::vector<bool> joined(length + 1);  // to the position before
  for (const auto& [weight, inputs, outputs] : products)
    for (Index at = outputs.front().at; at < outputs.back().at; ++at) joined[at + 1] = true;
  std::vector<Piece> pieces;
  std::vector<std::size_t> piece_at;
  for (Index begin = 0, end = 0; begin < length; begin = end) {
    end = std::min(begin + kPiece, length);
    while (joined[end]) --end;
    piece_at.resize(end, pieces.size());
    pieces.push_back({{begin, end}, {}});
  }
  for (const MinimalProduct& product : products)
    pieces[piece_at[product.outputs.front().at]].products.push_back(product);
  return pieces;
}

// The sequences of an axis, whose lengths differ by one at most.
struct Sequences {
  Index rate = 1;         // as many phases
  Index long_phases = 1;  // the first ones; the others are `shorter`
  Sequence longer, shorter;
  WeightSet used = 0;

  int weights() const { return std::popcount(used); }
  Index products() const {
    return long_phases * longer.products + (rate - long_phases) * shorter.products;
  }
};

Sequences sequences_of(const Axis& axis, Blocks allowed) {
  require(axis.kernel == 1 || axis.kernel == 3, "an axis' kernel must be 1 or 3 but is ",
          axis.kernel);
  require(axis.rate >= 1, "an axis' rate must be >= 1 but is ", axis.rate);
  require(axis.size >= 1 && axis.size <= kLongestAxis, "an axis' size must be in [1, ",
          kLongestAxis, "] but is ", axis.size);
  Sequences result;
  result.rate = axis.kernel == 1 ? axis.size : std::min(axis.rate, axis.size);
  const Index length = ceil_div(axis.size, result.rate);
  result.long_phases = axis.size - (length - 1) * result.rate;

  const Allowed kinds{allowed.triple, allowed.overlapped, allowed.pair, true};
  result.longer = best_cut(length, kinds, result.used);
  if (result.long_phases < result.rate) result.shorter = best_cut(length - 1, kinds, result.used);
  return result;
}

}  // namespace

MinimalCounts count_minimal(const Axis& axis, Blocks allowed) {
  const Sequences sequences = sequences_of(axis, allowed);
  return {sequences.products(), sequences.weights()};
}

MinimalAxis minimal_axis(const Axis& axis, Blocks allowed) {
  const auto [rate, long_phases, longer, shorter, used] = sequences_of(axis, allowed);
  MinimalAxis result;
  const auto is_used = [&, used = used](int weight) { return (used >> weight & 1) != 0; };
  for (int weight = 0; weight < std::ssize(kWeights); ++weight)
    if (is_used(weight)) result.weights.push_back(kWeights[weight]);
  result.denominator = is_used(kTriple[0].weight) ? 3 : 1;

  const std::vector<Piece> long_pieces = pieces_of(longer, result.denominator);
  const std::vector<Piece> short_pieces = pieces_of(shorter, result.denominator);
  std::vector<std::pair<const Piece*, Index>> phased;
  for (Index phase = 0; phase < rate; ++phase)
    for (const Piece& piece : phase < long_phases ? long_pieces : short_pieces)
      phased.emplace_back(&piece, phase);
  std::stable_sort(phased.begin(), phased.end(), [](const auto& a, const auto& b) {
    return a.first->positions.begin < b.first->positions.begin;
  });

  const auto count = [&] { return static_cast<Index>(result.products.size()); };
  for (const auto& [piece, phase] : phased) {
    const auto on_axis = [&, phase = phase, rate = rate](std::vector<Term> terms) {
      for (Term& term : terms) term.at = phase + term.at * rate;
      return terms;
    };
    const Index begin = count();
    for (const auto& [weight, inputs, outputs] : piece->products) {
      const Index index = std::popcount(used & ((1u << weight) - 1));
      result.products.push_back({index, on_axis(inputs), on_axis(outputs)});
    }
    std::vector<Index> positions;
    for (Index at = piece->positions.begin; at < piece->positions.end; ++at)
      positions.push_back(phase + at * rate);
    result.pieces.push_back({{begin, count()}, std::move(positions)});
  }
  return result;
}

}  // namespace aspp::plan
