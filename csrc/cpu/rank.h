// The ascending order of a row of keys, ties in index order: a radix sort in memory that the caller keeps.
#pragma once
#include <cstdint>
#include <vector>

namespace sk {

template <class Key>
class RowOrder {
 public:
  // index_of_rank: [size]
  void sort(const Key* keys, int64_t size, uint32_t* index_of_rank);

 private:
  struct Entry {
    Key key;
    uint32_t index;
  };
  std::vector<Entry> entries_, sorted_;
};

}  // namespace sk
