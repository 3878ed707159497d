#include "mapped.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <mutex>

namespace sk {
namespace {

std::mutex mutex;
std::vector<Range> mapped;

}  // namespace

void set_mapped(const std::vector<Range>& ranges) {
  const std::lock_guard<std::mutex> lock(mutex);
  mapped = ranges;
}

void give_back_mapped() {
#if defined(__linux__)
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return;  // another thread is at it
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  for (const auto& [address, bytes] : mapped) {
    const uintptr_t first = (address + page - 1) / page * page, last = (address + uintptr_t(bytes)) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
#endif
}

}  // namespace sk
