// The instructions of the ops steps_out and steps_limits: five integers each in its argument `program`.
#pragma once
#include <cstdint>

namespace sk {

// The order is that of surgery_kernels/ops/steps.py. d, a, b: registers, unless said otherwise.
enum class Code : int32_t {
  load,    // d = input a
  number,  // d = number a
  add,     // d = a + b
  sub,
  mul,
  div,
  fma,  // d = a * b + d, rounded once
  min,  // NaN where one is
  max,
  abs,  // d = |a|
  neg,
  sqrt,
  exp,
  log,
  gt,  // d = a > b ? 1 : 0
  ge,
  eq,
  select,  // d = d != 0 ? a : b
  within,  // d = a > number b, or a == number b and the element's place in its tensor < number b + 1, ? 1 : 0
  sum,     // sum d += a, in float64
  dot,     // sum d += a * b, in float64
  store,   // output d = a
  bits,    // output d, packed bits with the least significant first: a != 0
};
constexpr int kNumCodes = int(Code::bits) + 1;

struct Step {
  Code code;
  int32_t destination, a, b;
  bool rounds;  // the result, to the stored dtype
};

}  // namespace sk
