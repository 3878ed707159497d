// Which entries are kept of a row that is too long to be sorted in memory: where a word is below the limit of its
// entry's rank. Counts of the keys' leading bits bound every rank, which decides nearly all of them; the few between
// the bounds are collected, a bounded number at a time, and ranked among the rest.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sk {

template <class Key>
class LongRow {
 public:
  static constexpr int64_t kPiece = 4096;     // entries of a load
  static constexpr int64_t kBytes = 9 << 20;  // that it takes, about

  // load(first, count, keys, words): of entries first to first + count - 1. limit(rank): grows or falls with the rank,
  // 0 the smallest key's, ties by index. keep(i): called for every entry i that is kept.
  template <class Load, class Limit, class Keep>
  void decide(int64_t size, const Load& load, const Limit& limit, const Keep& keep) {
    count(size, load);
    for_each(size, load, [&](uint32_t index, Key key, uint32_t word) {
      const size_t b = bin(key);
      if (exact_ || slots_[b]) {  // equal keys pass in the order of their ranks
        if (word < limit(exact_ ? starts_[b]++ : fine_[fine(slots_[b], key)]++)) keep(index);
        return;
      }
      const uint32_t first = limit(starts_[b]), last = limit(starts_[b + 1] - 1);
      if (word < std::min(first, last)) return keep(index);
      if (word >= std::max(first, last)) return;
      undecided_.push_back({key, index, word, 0});
      if (undecided_.size() == kMost) resolve(size, load, limit, keep);
    });
    resolve(size, load, limit, keep);
  }

 private:
  static constexpr int kBinBits = 18, kShift = int(8 * sizeof(Key)) - 1 - kBinBits;
  static constexpr size_t kBins = size_t(1) << kBinBits, kSlots = 64, kFine = size_t(1) << 13, kMost = size_t(1) << 18;
  static constexpr bool kHasFine = kShift == 13;  // a crowded bin of float32 has a count for every key

  struct Entry {
    Key key;
    uint32_t index, word, before;  // before: entries of its bin between the one before it here and itself
    bool operator<(const Entry& other) const { return key != other.key ? key < other.key : index < other.index; }
  };

  static size_t bin(Key key) { return size_t(key >> kShift); }
  static size_t fine(uint8_t slot, Key key) { return size_t(slot - 1) * kFine + size_t(key & Key(kFine - 1)); }

  template <class Load, class Visit>
  void for_each(int64_t size, const Load& load, const Visit& visit) {
    Key keys[kPiece + 64];
    uint32_t words[kPiece + 64];
    for (int64_t first = 0; first < size; first += kPiece) {
      const int64_t count = std::min(kPiece, size - first);
      load(first, count, keys, words);
      for (int64_t i = 0; i < count; ++i) visit(uint32_t(first + i), keys[i], words[i]);
    }
  }

  // The rank of the first entry of every bin, and of every key of the most crowded ones.
  template <class Load>
  void count(int64_t size, const Load& load) {
    starts_.assign(kBins + 1, 0);
    slots_.assign(kBins, 0);
    Key low = 0;
    for_each(size, load, [&](uint32_t, Key key, uint32_t) {
      ++starts_[bin(key)];
      low |= key & ((Key(1) << kShift) - 1);
    });
    exact_ = low == 0;  // 16-bit task vectors, mostly: a bin holds one key
    if (kHasFine && !exact_) count_crowded(size, load);
    uint32_t before = 0;
    for (size_t b = 0; b <= kBins; ++b) {
      const uint32_t in_bin = starts_[b];
      starts_[b] = before;
      if (b < kBins && slots_[b])
        for (size_t f = 0, at = before; f < kFine; ++f) {
          uint32_t& start = fine_[fine(slots_[b], Key(f))];
          const uint32_t equal = start;
          start = uint32_t(at);
          at += equal;
        }
      before += in_bin;
    }
  }

  template <class Load>
  void count_crowded(int64_t size, const Load& load) {
    std::vector<uint32_t> bins;
    for (size_t b = 0; b < kBins; ++b)
      if (int64_t(starts_[b]) > size >> 10) bins.push_back(uint32_t(b));
    const size_t count = std::min(kSlots, bins.size());
    std::nth_element(bins.begin(), bins.begin() + int64_t(count), bins.end(),
                     [&](uint32_t a, uint32_t b) { return starts_[a] > starts_[b]; });
    for (size_t s = 0; s < count; ++s) slots_[bins[s]] = uint8_t(s + 1);
    fine_.assign(count * kFine, 0);
    for_each(size, load, [&](uint32_t, Key key, uint32_t) {
      if (const uint8_t slot = slots_[bin(key)]) ++fine_[fine(slot, key)];
    });
  }

  template <class Load, class Limit, class Keep>
  void resolve(int64_t size, const Load& load, const Limit& limit, const Keep& keep) {
    if (undecided_.empty()) return;
    std::sort(undecided_.begin(), undecided_.end());
    marked_.assign(kBins, false);
    for (const Entry& entry : undecided_) marked_[bin(entry.key)] = true;
    for_each(size, load, [&](uint32_t index, Key key, uint32_t) {
      if (!marked_[bin(key)]) return;
      const auto after = std::upper_bound(undecided_.begin(), undecided_.end(), Entry{key, index, 0, 0});
      if (after != undecided_.end() && bin(after->key) == bin(key)) ++after->before;
    });
    uint32_t rank = 0;
    for (size_t i = 0; i < undecided_.size(); ++i) {
      const Entry& entry = undecided_[i];
      const bool opens = i == 0 || bin(undecided_[i - 1].key) != bin(entry.key);
      rank = (opens ? starts_[bin(entry.key)] : rank) + entry.before;
      if (entry.word < limit(rank)) keep(entry.index);
    }
    undecided_.clear();
  }

  std::vector<uint32_t> starts_, fine_;
  std::vector<uint8_t> slots_;  // of a bin: 0, or 1 + its place in fine_
  std::vector<bool> marked_;
  std::vector<Entry> undecided_;
  bool exact_ = false;
};

}  // namespace sk
