// Threads that go through the same phases together.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace eaptk {

// Each thread takes the next free task of a phase; nobody enters the next one before all have left.
class Team {
   public:
    explicit Team(int size) : size_(size) {}

    // Call program(member) in every thread of the team, this one among them, and return when all have. Where the system
    // gives fewer threads the team is as many.
    void run(const std::function<void(int)>& program) {
        std::vector<std::thread> others;
        std::atomic<bool> complete{false};
        try {
            for (int i = 1; i < size_; ++i) {
                others.emplace_back([&, i] {
                    while (!complete.load(std::memory_order_acquire)) std::this_thread::yield();
                    program(i);
                });
            }
        } catch (const std::system_error&) {
        }
        size_ = 1 + int(others.size());
        complete.store(true, std::memory_order_release);
        program(0);
        for (auto& other : others) other.join();
    }

    // Called by all: work(task) for every task in [0, n_tasks), and a wait for the others.
    template <class Work>
    void phase(std::int64_t n_tasks, const Work& work) {
        if (!n_tasks) return;
        for (std::int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) work(task);
        const std::int64_t passed = passed_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            next_.store(0, std::memory_order_relaxed);
            arrived_.store(0, std::memory_order_relaxed);
            passed_.store(passed + 1, std::memory_order_release);
        } else {
            for (int spins = 0; passed_.load(std::memory_order_acquire) == passed; ++spins) {
                if (spins < kSpins) {
                    pause();
                } else {
                    std::this_thread::yield();
                }
            }
        }
    }

   private:
    static constexpr int kSpins = 1000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    int size_;
    std::atomic<std::int64_t> next_{0}, passed_{0};
    std::atomic<int> arrived_{0};
};

}  // namespace eaptk
