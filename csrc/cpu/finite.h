// NaN and infinity, where they are an error.
#pragma once
#include <string>
#include <vector>

#include "scope.h"

namespace sk {

// Raises when a task vector of the scope holds NaN or infinity, naming the first.
template <class Key>
void check_finite(const Scope& scope, const std::vector<std::string>& names);

}  // namespace sk
