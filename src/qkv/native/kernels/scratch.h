// Memory that is used again from call to call.
#pragma once
#include <cstdlib>
#include <new>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace qkv {

// Memory that grows, aligned to cache lines, never copied.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      const size_t page = bytes < LARGE ? 4096 : LARGE;  // of large memory in large pages, which spare address lookups
      size_ = (bytes + page - 1) / page * page;
      data_ = aligned_alloc(page, size_);
#ifdef MADV_HUGEPAGE
      if (data_ && page == LARGE) madvise(data_, size_, MADV_HUGEPAGE);
#endif
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  template <class T>
  T* as(size_t count) {
    return (T*)reserve(count * sizeof(T));
  }

 private:
  static constexpr size_t LARGE = 1 << 21;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace qkv
