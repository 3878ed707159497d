// The importable module. Loading the library registers the ops (ops.cpp); no Tensor crosses pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/one_read_from.h"
#include "cpu/scope.h"
#include "cpu/trim.h"
#include "philox.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// CMake's list of architectures.
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> list;
  std::istringstream names(SK_CUDA_ARCHS);
  for (std::string name; std::getline(names, name, ',');) list.push_back(name);
  return list;
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("version"_a = SK_VERSION, "compiler"_a = kCompiler, "torch"_a = SK_TORCH_VERSION,
                  "isas"_a = sk::compiled_isas(), "cuda"_a = cuda_architectures());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "Version, compiler, torch compiled against, instruction sets and CUDA architectures compiled in.");
  m.def("isas", &sk::machine_isas, "The instruction sets this machine runs, narrowest first.");
  m.def("isa", [] { return sk::isa_name(sk::current_isa()); }, "The instruction set the CPU kernels use now.");
  m.def("set_isa", &sk::set_isa, py::arg("name"), py::arg("argument") = "name",
        "Chooses the instruction set of every later call; merges do not depend on it. `argument` is named in errors.");
  m.def(
      "bytes_read", [] { return sk::bytes_read.load(); },
      "Bytes of tensors that every call went through so far, for progress bars.");
  m.def("set_mapped", &sk::set_mapped, py::arg("ranges"),
        "Addresses and bytes of read-only shared maps of files, whose pages calls give back as they go; [] ends it.");
  m.def("force_histogram", &sk::force_histogram, py::arg("on"), "Tests only: finds thresholds by the fallback.");
  m.def("one_read_from", &sk::one_read_from, "Bytes of inputs from which ties_merge reads them once, where it can.");
  m.def("set_one_read_from", &sk::set_one_read_from, py::arg("nbytes"),
        "Tests only: bytes of inputs from which ties_merge reads them once; gives what it was.");
  m.def(
      "philox_block",
      [](uint64_t seed, uint32_t tensor_id, uint32_t task_id, uint64_t block) {
        return sk::philox_block({seed, tensor_id, task_id}, block);
      },
      py::arg("seed"), py::arg("tensor_id"), py::arg("task_id"), py::arg("block"),
      "Tests only: the four random words that decide on elements 4 * block to 4 * block + 3.");
}
