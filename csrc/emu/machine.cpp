#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace sk {
namespace emu {
namespace {

constexpr size_t kStack = 64 << 10;

enum class State { ready, in_barrier, in_gather, ended };

// A place to go on from. Contexts start fibers; jumps between them spare the system calls of swapcontext.
struct Context {
  ucontext_t start;
  jmp_buf jump;
};

void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.start, &to.start);  // which the sanitizer follows
#else
  if (_setjmp(from.jump) == 0) _longjmp(to.jump, 1);
#endif
}

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  Place place;
  int index;
  unsigned mask;
  uint64_t value, gathered[32];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // those of a block come first
  std::vector<char> shared;
  Context scheduler;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  int size = 0, alive = 0, in_barrier = 0;
  bool any = false, any_before = false;
  std::mt19937 random;
  bool shuffled = false;
};

Machine machine;

void wait(State state) {
  Fiber& self = *machine.running;
  self.state = state;
  switch_to(self.context, machine.scheduler);
}

// A fiber serves one thread after another.
void run_threads() {
  for (;;) {
    wait(State::ended);
    (*machine.body)();
  }
}

void add_fiber() {
  Fiber& fiber = *machine.fibers.emplace_back(std::make_unique<Fiber>());
  getcontext(&fiber.context.start);
  fiber.context.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.start.uc_stack.ss_size = kStack;
  fiber.context.start.uc_link = nullptr;
  makecontext(&fiber.context.start, run_threads, 0);
  machine.running = &fiber;
  if (_setjmp(machine.scheduler.jump) == 0) swapcontext(&machine.scheduler.start, &fiber.context.start);
}

void open_barrier() {
  for (int i = 0; i < machine.size; ++i)
    if (machine.fibers[i]->state == State::in_barrier) machine.fibers[i]->state = State::ready;
  machine.in_barrier = 0;
  machine.any_before = machine.any;
  machine.any = false;
}

std::vector<unsigned> order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.shuffled) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

void run_block(Dim grid, Dim block, Dim index) {
  std::fill(machine.shared.begin(), machine.shared.end(), char(0xA5));
  machine.size = machine.alive = int(block.x);
  machine.in_barrier = 0;
  machine.any = false;
  while (int(machine.fibers.size()) < machine.size) add_fiber();
  for (int i = 0; i < machine.size; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.state = State::ready;
    fiber.place = {Dim(unsigned(i), 0, 0), index, block, grid};
    fiber.index = i;
  }
  while (machine.alive > 0) {
    bool progress = false;
    for (const unsigned i : order(unsigned(machine.size))) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.state != State::ready) continue;
      progress = true;
      machine.running = &fiber;
      switch_to(machine.scheduler, fiber.context);
      if (fiber.state != State::ended) continue;
      --machine.alive;
      if (machine.in_barrier > 0 && machine.in_barrier == machine.alive) open_barrier();
    }
    if (progress) continue;
    machine.fibers.clear();  // they wait within the kernel
    throw std::runtime_error("every thread of a block must reach the same barrier, some never do");
  }
}

}  // namespace

const Place& place() { return machine.running->place; }
int lane() { return machine.running->index % 32; }

void* dynamic_shared() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(machine.shared.data()) + 15) & ~uintptr_t(15));
}

void shuffle_threads(unsigned seed) {
  machine.shuffled = seed != 0;
  machine.random.seed(seed);
}

bool barrier(bool any) {
  machine.any |= any;
  if (++machine.in_barrier == machine.alive)
    open_barrier();
  else
    wait(State::in_barrier);
  return machine.any_before;
}

const uint64_t* gather(unsigned mask, uint64_t value) {
  Fiber& self = *machine.running;
  self.mask = mask;
  self.value = value;
  self.state = State::in_gather;
  const int first = self.index - self.index % 32;
  const auto member = [&](int lane) -> Fiber* {
    return mask >> lane & 1 && first + lane < machine.size ? machine.fibers[first + lane].get() : nullptr;
  };
  bool complete = mask >> (self.index % 32) & 1;
  for (int l = 0; l < 32 && complete; ++l)
    if (mask >> l & 1) complete = member(l) && member(l)->state == State::in_gather && member(l)->mask == mask;
  if (!complete) {
    wait(State::in_gather);
    return self.gathered;
  }
  for (int l = 0; l < 32; ++l) {
    Fiber* const to = member(l);
    if (!to) continue;
    for (int from = 0; from < 32; ++from) to->gathered[from] = member(from) ? member(from)->value : 0;
    to->state = State::ready;
  }
  return self.gathered;
}

void launch(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& body) {
  machine.shared.assign(shared_bytes + 16, 0);
  machine.body = &body;
  for (unsigned y = 0; y < grid.y; ++y)
    for (const unsigned x : order(grid.x)) run_block(grid, block, Dim(x, y, 0));
}

}  // namespace emu
}  // namespace sk
