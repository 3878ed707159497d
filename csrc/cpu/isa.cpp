#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace sk {
namespace {

#define SK_ISA_VALUE(isa, ...) Isa::isa,
constexpr std::array kIsas{SK_EACH_ISA(SK_ISA_VALUE)};

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // every machine with AVX2 and FMA also has F16C, which older compilers cannot ask for
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return isa == Isa::base || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  (void)isa;  // NEON is part of every 64-bit ARM
  return true;
#endif
}

Isa widest() {
  Isa best = Isa::base;
  for (Isa isa : kIsas)
    if (runs_here(isa)) best = isa;
  return best;
}

std::atomic<Isa> current{widest()};

}  // namespace

Isa current_isa() { return current.load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
#define SK_ISA_STRING(isa, ...) #isa,
  static constexpr std::array names{SK_EACH_ISA(SK_ISA_STRING)};
  return names[static_cast<std::size_t>(isa)];
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) names.emplace_back(isa_name(isa));
  return names;
}

std::vector<std::string> machine_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas)
    if (runs_here(isa)) names.emplace_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name, const std::string& argument) {
  std::string choices;
  for (Isa isa : kIsas) {
    if (!runs_here(isa)) continue;
    if (name == isa_name(isa)) return current.store(isa, std::memory_order_relaxed);
    choices += (choices.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument(argument + " must be one of " + choices + " on this machine, got '" + name + "'");
}

}  // namespace sk
