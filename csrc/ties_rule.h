// How a TIES merge adds up, to its last rounding.
#pragma once

namespace sk {

// mergekit_all, exact_all, magmax: without an election. exact_all and magmax round once, as exact does.
enum class Rule { paper, paper_max, mergekit, mergekit_all, peft, exact, exact_all, magmax };
constexpr int kRules = 8;

}  // namespace sk
