// How a TIES merge adds up, to its last rounding.
#pragma once

namespace sk {

enum class Rule { paper, paper_max, mergekit, mergekit_all, peft };  // mergekit_all: without an election
constexpr int kRules = 5;

}  // namespace sk
