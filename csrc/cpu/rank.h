// The ascending order of a row of keys, ties in index order: a radix sort in memory that the caller keeps.
#pragma once
#include <cstdint>
#include <vector>

namespace sk {

template <class Key>
class RowOrder {
 public:
  struct Entry {
    Key key;
    uint32_t index;
  };

  // [size], until the next call
  const Entry* sort(const Key* keys, int64_t size);

 private:
  std::vector<Entry> entries_, sorted_;
};

}  // namespace sk
