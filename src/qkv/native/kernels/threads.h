// The threads of an engine: they run the same function side by side and meet at barriers. Between calls they sleep.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace qkv {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// An atomic in a cache line of its own.
struct alignas(64) Counter {
  std::atomic<int> value{0};
};

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  // Until all threads are here. Meanwhile `bytes` of what will be read next are brought into the cache.
  void wait(const uint8_t* next = nullptr, int64_t bytes = 0) {
    if (threads_ == 1) return;
    int now = generation_.value.load(std::memory_order_relaxed);
    if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.value.store(0, std::memory_order_relaxed);
      generation_.value.store(now + 1, std::memory_order_release);
      return;
    }
    int64_t at = 0;
    for (int spins = 0; generation_.value.load(std::memory_order_acquire) == now; spins++) {
      if (at < bytes) {
        __builtin_prefetch(next + at, 0, 2);
        at += 64;
      } else {
        pause();
      }
      if (spins > PATIENCE) sched_yield();  // a peer may have lost its core
    }
  }

 private:
  static constexpr int PATIENCE = 4000;
  const int threads_;
  Counter arrived_, generation_;
};

class Pool {
 public:
  explicit Pool(int threads) : barrier(threads), threads_(threads) {
    for (int t = 1; t < threads; t++) peers_.emplace_back([this, t] { work(t); });
  }

  ~Pool() {
    job_ = nullptr;
    call();
    for (auto& peer : peers_) peer.join();
  }

  // job(t) on every thread t; returns when all have met at the barrier with which a job must end.
  void run(const std::function<void(int)>& job) {
    job_ = &job;
    call();
    job(0);
  }

  int threads() const { return threads_; }

  Barrier barrier;

 private:
  static constexpr int PATIENCE = 20000;  // spins before a thread sleeps: about the time between two tokens

  void call() {
    epoch_.fetch_add(1);
    epoch_.notify_all();
  }

  void work(int t) {
    for (int seen = 0;;) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; spins++) {
        if (spins < PATIENCE)
          pause();
        else
          epoch_.wait(seen);
      }
      seen++;
      if (!job_) return;
      (*job_)(t);
    }
  }

  const int threads_;
  std::atomic<int> epoch_{0};
  const std::function<void(int)>* job_ = nullptr;
  std::vector<std::thread> peers_;
};

}  // namespace qkv
