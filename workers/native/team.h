// The threads of one parallel region, and how they divide work.

#pragma once

#include <omp.h>

#include <cstdint>
#include <utility>

namespace saqqara {

// The threads that work on the same rows: all of them, or one alone.
struct Team {
  int64_t rank;
  int64_t size;

  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }

  // This thread's part of `count` items.
  std::pair<int64_t, int64_t> share(int64_t count) const {
    return {count * rank / size, count * (rank + 1) / size};
  }
};

}  // namespace saqqara
