// Runs CUDA kernels on the CPU, for tests: the blocks of a grid one after another, every thread of a block a fiber that
// runs until it waits for others. Waiting for threads that never come is an error, not a hang. Threads and blocks run
// in order or, from a seed, in a different random order every time: results that depend on it betray a missing barrier.
#pragma once
#include <cstdint>
#include <functional>

namespace sk {
namespace emu {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  Dim() = default;
  Dim(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Where the running thread is.
struct Place {
  Dim thread, block, block_size, grid_size;
};
const Place& place();

// Runs body() once per thread. Throws when threads wait for one another forever.
void launch(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& body);

// The block's dynamic shared memory, filled with a pattern before every block.
void* dynamic_shared();

// Waits for every thread of the block that has not ended. True where any of them says so.
bool barrier(bool any);

// Waits for the lanes of `mask`, which all leave a value. values: [32], those of the lanes; valid until the next call.
const uint64_t* gather(unsigned mask, uint64_t value);
int lane();

// 0: in order.
void shuffle_threads(unsigned seed);

}  // namespace emu
}  // namespace sk
