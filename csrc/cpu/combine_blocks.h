// The runs of parameters that share coefficients and, where they are masked, a mean; and the pieces that threads take.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../check.h"
#include "block_sums.h"
#include "scope.h"

namespace sk {

// They need not be multiples of anything and may be empty.
struct Blocks {
  Tensor alive;
  const int64_t* offsets;  // [count + 1]
  int64_t count;

  Blocks(const Tensor& block_offsets, int64_t num_params) : alive(torch::stable::contiguous(block_offsets)) {
    require(alive.is_cpu() && alive.dim() == 1 && alive.numel() > 0 && alive.scalar_type() == ScalarType::Long,
            "block_offsets must be int64 [num_blocks + 1] on the CPU, got another dtype, shape or device");
    offsets = static_cast<const int64_t*>(alive.data_ptr());
    count = alive.numel() - 1;
    require(offsets[0] == 0, "block_offsets must start at 0, got ", offsets[0]);
    for (int64_t b = 0; b < count; ++b)
      require(offsets[b] <= offsets[b + 1], "block_offsets must not decrease, got ", offsets[b + 1], " after ",
              offsets[b]);
    require(offsets[count] == num_params, "block_offsets must end at the number of parameters, ", num_params, ", got ",
            offsets[count]);
  }

  int64_t size(int64_t block) const { return offsets[block + 1] - offsets[block]; }

  // Runs body(block, begin, count) over the pieces of [begin, end) that lie in one block each.
  template <class Body>
  void each_piece(int64_t begin, int64_t end, const Body& body) const {
    int64_t block = std::upper_bound(offsets, offsets + count + 1, begin) - offsets - 1;
    for (; begin < end; ++block) {
      const int64_t stop = std::min(end, offsets[block + 1]);
      if (begin < stop) body(block, begin, stop - begin);
      begin = stop;
    }
  }
};

// Blocks cut every kSumBlock elements from their own beginning on. What is random counts the elements of its block, and
// what is added up is added up piece by piece: neither depends on where a block lies or who takes which piece.
struct Piece {
  int64_t block, place, begin, count;  // place: elements of the block before it; begin: of all parameters
};

class Pieces {
 public:
  explicit Pieces(const Blocks& blocks) : blocks_(blocks) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      first_.push_back(int64_t(all_.size()));
      for (int64_t place = 0; place < blocks.size(b); place += kSumBlock)
        all_.push_back({b, place, blocks.offsets[b] + place, std::min(kSumBlock, blocks.size(b) - place)});
    }
    first_.push_back(int64_t(all_.size()));
  }

  int64_t count() const { return int64_t(all_.size()); }

  // Runs body(piece, its index).
  template <class Body>
  void parallel(const Body& body) const {
    torch::stable::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(all_[size_t(i)], i);
    });
  }

  // The same with room for the elements of a piece.
  template <class C, class Body>
  void parallel_with_room(const Body& body) const {
    torch::stable::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      std::vector<C> room(static_cast<size_t>(kSumBlock));
      for (int64_t i = first; i < last; ++i) body(all_[size_t(i)], i, room.data());
    });
  }

  // The sums of a block from those of its pieces, of which there are `width`: sums[piece * width + j].
  std::vector<double> of_block(const std::vector<double>& sums, int64_t block, int64_t width) const {
    const int64_t first = first_[size_t(block)], pieces = first_[size_t(block) + 1] - first;
    std::vector<double> folded, column(static_cast<size_t>(pieces));
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t p = 0; p < pieces; ++p) column[size_t(p)] = sums[size_t((first + p) * width + j)];
      folded.push_back(fold_halves(column.data(), pieces));
    }
    return folded;
  }

 private:
  const Blocks& blocks_;
  std::vector<Piece> all_;
  std::vector<int64_t> first_;  // piece of every block  # [num_blocks + 1]
};

}  // namespace sk
