// Trim, elect, disjoint merge, scale, add to base and round, over raw pointers: each input is read once, no task vector
// is ever stored. Sums over experts run in order; the sums of the positive and of the negative entries are kept side by
// side, so the election needs no second look at the experts. Of a mask 8 bytes are read at a time: it has room for
// them.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "../ties_rule.h"
#include "isa.h"

namespace sk {

// An element whose election was a draw between entries, and its result under the sign that was not assumed.
struct Draw {
  int64_t index;  // within the run
  unsigned char value[8];
};

template <class Key>
struct TiesArgs {
  using C = ComputeOf<Key>;

  const void* base;            // may be null: the experts are task vectors, and so is the result
  const void* const* experts;  // [num_tasks]
  const Key* limits;           // [num_tasks] keep abs(task vector) with a key above; never negative
  const C* weights;            // [num_tasks] or null: all one
  const C* rescales;           // [num_tasks] or null: all one
  const C* unique_scales;      // [num_tasks] or null: exact_all with divide: factors of entries that are alone
  const uint8_t* const*
      masks;  // [num_tasks] or null: the entry of element i is kept where bit first_bit + i is set, too
  int64_t first_bit;
  int min_count;  // elements with fewer kept entries are those of the base
  int num_tasks;
  int64_t n;
  C lam;
  C divisor;         // mergekit_all with divide
  bool elect_count;  // elect by the number of signs, not by their mass
  bool divide;       // mean, not sum
  bool finite;       // no task vector holds NaN or infinity
  bool drop;         // a non-finite entry of a task vector counts as 0
  bool stream;       // write past the caches
  int zero_sign;     // paper: the sign where the election is a draw
  Draw* draws;       // [max_draws]
  int max_draws;
};

struct TiesResult {
  int64_t sign_sum;   // sum of the elected signs, draws as 0
  int64_t num_draws;  // draws with entries to choose from; beyond max_draws they are counted, not recorded
};

template <class Key>
struct TiesKernel {
  // out: n elements.
  TiesResult (*merge[kRules])(const TiesArgs<Key>& args, void* out);  // by Rule
  // outs: for every expert n elements, its entries that agree with the elected sign, else 0. Records no draw.
  TiesResult (*split[kRules])(const TiesArgs<Key>& args, void* const* outs);
};

using TiesKernels = PerDtype<TiesKernel>;

SK_DECLARE_KERNELS(TiesKernels, ties_kernels);

}  // namespace sk
