// Threads and memory, the same ones for all sources of a library.

#pragma once

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

typedef void (*Work)(void*);
typedef void (*Fork)(Work, void*, unsigned threads, unsigned flags);  // GOMP_parallel

// Threads for where PyTorch has no OpenMP whose threads could be used. They live as long as the process.
class Threads {
   public:
    void run(Work work, void* data, int count) {
        std::unique_lock<std::mutex> lock(mutex_);
        start(count - 1);
        work_ = work, data_ = data, wanted_ = running_ = count - 1;
        ++round_;
        begin_.notify_all();
        lock.unlock();
        work(data);
        lock.lock();
        end_.wait(lock, [this] { return running_ == 0; });
    }

   private:
    void start(int count) {
        if (process_ != getpid()) process_ = getpid(), there_ = 0;  // a fork has none of them
        for (; there_ < count; ++there_) std::thread(&Threads::loop, this, there_, round_).detach();
    }

    void loop(int index, long seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            begin_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (index >= wanted_) continue;
            Work work = work_;
            void* data = data_;
            lock.unlock();
            work(data);
            lock.lock();
            if (--running_ == 0) end_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable begin_, end_;
    Work work_ = nullptr;
    void* data_ = nullptr;
    int wanted_ = 0, running_ = 0, there_ = 0;
    long round_ = 0;
    pid_t process_ = 0;
};

// One call at a time has them; another that comes meanwhile runs alone.
inline void run_own_threads(Work work, void* data, int count) {
    static Threads* threads = new Threads;
    static std::mutex busy;
    std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    if (lock.owns_lock())
        threads->run(work, data, count);
    else
        work(data);
}

constexpr double READS_A_THREAD = 50e3;  // numbers that are worth another thread

// Has so many threads do the work, the calling one among them. fork: starts those of another pool.
inline void run_threads(Work work, void* data, long count, Fork fork) {
    if (count <= 1)
        work(data);
    else if (fork)
        fork(work, data, (unsigned)count, 0);
    else
        run_own_threads(work, data, (int)count);
}

constexpr long MAX_NODES = 8;  // of memory

// Numbers 0, 1, ... handed out to whoever asks, and a wait for all of them to be done. It holds with any number of threads.
// Those from begin[node] on are a node's, whose threads get them first; the first node begins with 0.
struct Tasks {
    std::atomic<long> given[MAX_NODES] = {}, done{0};
    long begin[MAX_NODES] = {}, nodes = 1, count = 0;

    // count or more if there is none left.
    long take(long node) {
        for (long i = 0; i < nodes; ++i) {
            const long n = (node + i) % nodes, end = n + 1 < nodes ? begin[n + 1] : count;
            const long task = begin[n] + given[n].fetch_add(1, std::memory_order_relaxed);
            if (task < end) return task;
        }
        return count;
    }
    void finish() { done.fetch_add(1, std::memory_order_release); }
    void wait() const {
        for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 4000) sched_yield();
        }
    }

    // Every task once, each with the one that this thread does after it; returns when all are done, also those of others.
    template <class F>
    void each(F f, long node = 0) {
        for (long task = take(node), next; task < count; task = next) {
            next = take(node);
            f(task, next);
            finish();
        }
        wait();
    }
};

// The calling thread's memory, kept from call to call.
class Arena {
   public:
    ~Arena() { free(memory_); }

    bool reserve(size_t size) {
        if (size <= size_) return true;
        free(memory_);
        size_ = 0;
        size_t rounded = (size + size / 8 + 4095) & ~(size_t)4095;
        memory_ = (char*)aligned_alloc(4096, rounded);
        if (memory_) size_ = rounded;
        return memory_ != nullptr;
    }

    void release() { free(memory_), memory_ = nullptr, size_ = 0; }
    char* begin() const { return memory_; }
    size_t size() const { return size_; }

   private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

inline thread_local Arena arena;

// Cuts an arena into arrays; without memory it only counts.
struct Cut {
    char* at;
    size_t used;

    template <class V>
    V* take(size_t count) {
        V* array = (V*)(at + used);
        used += (count * sizeof(V) + 127) & ~(size_t)127;
        return array;
    }
};

// Has `lay_out` cut its arrays twice: to count, then out of the arena. False where there is no memory.
template <class F>
bool place(Arena& arena, F lay_out) {
    Cut sizes = {nullptr, 0};
    lay_out(sizes);
    if (!arena.reserve(sizes.used)) return false;
    Cut real = {arena.begin(), 0};
    lay_out(real);
    return true;
}
