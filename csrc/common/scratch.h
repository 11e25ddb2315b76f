// Memory: the line buffers of one task (Scratch), and what one call needs (Heap). Scratch memory belongs to the
// thread and is kept for its next task, so that a network's second call allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sodfast {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

class Scratch {
 public:
  static constexpr int64_t align = 64;

  // Bytes that `n` items of T take here, with room for a whole vector after the last and a stagger of one cache
  // line, so that buffers whose sizes are multiples of 4 KiB do not fight for the same cache sets.
  template <class T>
  static int64_t bytes(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 3 * align - 1) / align * align;
  }

  explicit Scratch(int64_t total) {
    Block& block = thread_block();
    if (block.size < total) {
      guard(block.data, block.size, false);
      std::free(block.data);
      block.data = nullptr, block.size = 0;
      block.data = static_cast<char*>(std::aligned_alloc(align, (total + align - 1) / align * align));
      if (block.data == nullptr) throw std::bad_alloc();
      block.size = total;
    }
    next_ = block.data;
    end_ = block.data + total;
    guard(next_, block.size, true);
  }

  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(n);
    if (next_ > end_) std::abort();  // a task asked for less than it takes: a bug, never an input
    guard(p, n * static_cast<int64_t>(sizeof(T)), false);
    return p;
  }

 private:
  struct Block {
    char* data = nullptr;
    int64_t size = 0;
    ~Block() {
      guard(data, size, false);
      std::free(data);
    }
  };
  // Under AddressSanitizer the room between two buffers is out of bounds, as it would be between two mallocs.
  static void guard([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes, [[maybe_unused]] bool forbid) {
#if defined(__SANITIZE_ADDRESS__)
    forbid ? __asan_poison_memory_region(p, static_cast<size_t>(bytes))
           : __asan_unpoison_memory_region(p, static_cast<size_t>(bytes));
#endif
  }
  static Block& thread_block() {
    thread_local Block block;
    return block;
  }
  char* next_;
  char* end_;
};

template <class T>
class Heap {  // memory of one call, for packed weights and partial sums
 public:
  explicit Heap(int64_t n) : data_(static_cast<T*>(std::malloc(static_cast<size_t>(most(n, 1)) * sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Heap() { std::free(data_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace sodfast
