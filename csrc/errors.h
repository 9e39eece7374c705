// What is thrown for a bad value; Python raises fastprompt.errors.ArgumentError with the same text.
#pragma once

#include <stdexcept>

namespace fastprompt {

struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace fastprompt
