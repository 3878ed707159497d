// The instruction sets the kernels are compiled for, and the choice among them at run time.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

// X(isa, ...) for each of them, from the narrowest to the widest; base runs on every machine.
#if defined(__x86_64__)
#define SK_EACH_ISA(X, ...) X(base, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__)
#elif defined(__aarch64__)
#define SK_EACH_ISA(X, ...) X(base, __VA_ARGS__) X(neon, __VA_ARGS__)
#else
#define SK_EACH_ISA(X, ...) X(base, __VA_ARGS__)
#endif

// In a kernel header, inside namespace sk: SK_DECLARE_KERNELS(TrimKernels, trim_kernels);
#define SK_DECLARE_KERNELS(type, table) SK_EACH_ISA(SK_DECLARE_TABLE, type, table) static_assert(true)
#define SK_DECLARE_TABLE(isa, type, table) \
  namespace isa {                          \
  extern const type table;                 \
  }

// In a host file: const TrimKernels& kernels = SK_KERNELS(trim_kernels);
#define SK_KERNELS(table) \
  (*std::array{SK_EACH_ISA(SK_TABLE_ADDRESS, table)}[static_cast<std::size_t>(sk::current_isa())])
#define SK_TABLE_ADDRESS(isa, table) &sk::isa::table,

namespace sk {

#define SK_ISA_ENUMERATOR(isa, ...) isa,
enum class Isa { SK_EACH_ISA(SK_ISA_ENUMERATOR) };
#undef SK_ISA_ENUMERATOR

Isa current_isa();

const char* isa_name(Isa isa);
std::vector<std::string> compiled_isas();
std::vector<std::string> machine_isas();  // those compiled in that this machine runs

// Safe while ops run: merges do not depend on it, surgery by rounding only. Throws std::invalid_argument that names
// `argument`.
void set_isa(const std::string& name, const std::string& argument);

}  // namespace sk
