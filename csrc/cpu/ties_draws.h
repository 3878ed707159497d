// Drawn elections of a TIES merge. They take the sign of the sum of all elected signs, known at the end only: every
// chunk goes by the running sum and records its draws under the other sign; at the end wrong guesses are overwritten. A
// chunk with more draws than it may record is merged once more.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "ties_merge_kernel.h"

namespace sk {

constexpr int kMaxDraws = 512;  // recorded per chunk

class Draws {
 public:
  using List = std::vector<Draw>;

  // What was assumed of a chunk, and its elections.
  struct Guess {
    int8_t sign = 0;  // 0: no draws
    int32_t sign_sum = 0, num_draws = 0, first = 0;
    const List* draws = nullptr;  // from `first` on those of the chunk, if it may record as many

    const Draw* begin() const { return draws->data() + first; }
  };

  // num_chunks: 0 where nothing is drawn.
  explicit Draws(int64_t num_chunks) : guesses_(size_t(num_chunks)) {}

  bool any() const { return !guesses_.empty(); }
  Guess& operator[](int64_t chunk) { return guesses_[size_t(chunk)]; }

  // What to assume now.
  int8_t guess() const { return sign_sum_.load(std::memory_order_relaxed) >= 0 ? 1 : -1; }

  // One for every thread.
  List& new_list() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return lists_.emplace_back();
  }

  // How a chunk came out under a sign. recorded: its draws, if they are no more than max_draws.
  void set(int64_t chunk, int8_t sign, TiesResult result, const Draw* recorded, int max_draws, List& list) {
    if (!any()) return;
    Guess& guess = guesses_[size_t(chunk)];
    sign_sum_.fetch_add(result.sign_sum - guess.sign_sum, std::memory_order_relaxed);
    guess = {int8_t(result.num_draws ? sign : 0), int32_t(result.sign_sum), int32_t(result.num_draws),
             int32_t(list.size()), &list};
    if (result.num_draws <= max_draws) list.insert(list.end(), recorded, recorded + result.num_draws);
  }

  // What draws take in the end.
  int8_t sign() const {
    const int64_t sum = sign_sum_.load();
    return int8_t((sum > 0) - (sum < 0));
  }

 private:
  std::vector<Guess> guesses_;  // of every chunk
  std::deque<List> lists_;
  std::mutex mutex_;
  std::atomic<int64_t> sign_sum_{0};
};

}  // namespace sk
