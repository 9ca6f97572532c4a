#include "base/expert_residency.h"

#include <algorithm>
#include <cerrno>
#include <system_error>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22
#endif

namespace dsv4 {
namespace {

constexpr int READ_THREADS = 4;  // they mostly wait for the disk

void* address(uintptr_t place) { return reinterpret_cast<void*>(place); }

// Pages of all experts as few ranges.
std::vector<Pages> joined(const std::vector<std::vector<Pages>>& experts) {
    std::vector<Pages> ranges, whole;
    for (const auto& expert : experts) ranges.insert(ranges.end(), expert.begin(), expert.end());
    std::sort(ranges.begin(), ranges.end(), [](const Pages& a, const Pages& b) { return a.first < b.first; });
    for (const Pages& p : ranges) {
        const int64_t before = whole.empty() ? -1 : static_cast<int64_t>(p.first - whole.back().first);
        if (!whole.empty() && whole.back().file == p.file && before <= whole.back().size)
            whole.back().size = std::max(whole.back().size, before + p.size);
        else
            whole.push_back(p);
    }
    return whole;
}

#ifdef __linux__
// True if the page cache still has pages near either end of a range, the outermost pages aside, which may be others'.
bool has_cached_ends(const Pages& p) {
    constexpr int64_t AROUND = 16;  // pages that a fault maps at once
    const int64_t page = sysconf(_SC_PAGESIZE), inner = p.size / page - 2, count = std::min(inner, AROUND);
    unsigned char cached[AROUND];
    for (int64_t first : {int64_t{1}, 1 + inner - count}) {
        void* place = address(p.first + static_cast<uintptr_t>(first * page));
        if (count <= 0 || mincore(place, static_cast<size_t>(count * page), cached) != 0) return false;
        if (std::any_of(cached, cached + count, [](unsigned char c) { return c & 1; })) return true;
    }
    return false;
}
#endif

}  // namespace

ExpertResidency::ExpertResidency(int64_t budget, int64_t experts, std::vector<std::vector<Pages>> pages,
                                 const std::vector<int>& files)
    : budget_(budget), experts_per_layer_(experts), free_(budget) {
    try {
        start_up(std::move(pages), files);
    } catch (...) {  // e.g. the system has no more threads
        stop();
        throw;
    }
}

ExpertResidency::~ExpertResidency() { stop(); }

void ExpertResidency::start_up(std::vector<std::vector<Pages>> pages, const std::vector<int>& files) {
    files_.reserve(files.size());
    for (int file : files) {
        const int copy = fcntl(file, F_DUPFD_CLOEXEC, 0);
        if (copy < 0) throw std::system_error(errno, std::generic_category(), "dup");
        files_.push_back(copy);
    }
    for (const Pages& p : joined(pages)) {
#ifdef __linux__
        // Without it a fault reads pages around the one that is needed, which may be another expert's.
        madvise(address(p.first), static_cast<size_t>(p.size), MADV_RANDOM);
#endif
        drop(p);
    }
    for (auto& own : pages) {
        Expert expert;
        for (const Pages& p : own) expert.size += p.size;
        expert.pages = std::move(own);
        experts_.push_back(std::move(expert));
    }
    for (int i = 0; i < READ_THREADS; ++i) threads_.emplace_back([this] { work(); });
}

void ExpertResidency::stop() {
    {
        std::lock_guard lock(mutex_);
        closing_ = true;
    }
    jobs_changed_.notify_all();
    for (auto& thread : threads_) thread.join();
    // The advice to read no neighbours stays: another residency may already rely on it.
    for (int file : files_) close(file);
}

ResidencyCounts ExpertResidency::counts() {
    std::lock_guard lock(mutex_);
    ResidencyCounts now = counts_;
    now.resident_bytes = budget_ - free_;
    return now;
}

void ExpertResidency::read_ahead(const std::vector<std::pair<int64_t, std::vector<int32_t>>>& certain) {
    std::lock_guard lock(mutex_);
    for (size_t id : ahead_) experts_[id].ahead = false;  // of an earlier forward that did not claim them
    unused_.splice(unused_.end(), ahead_);
    unused_bytes_ += ahead_bytes_;
    ahead_bytes_ = 0;
    int64_t aside = 0;
    for (const auto& [layer, experts] : certain)
        for (int32_t e : experts) {
            const size_t id = static_cast<size_t>(layer * experts_per_layer_ + e);
            Expert& expert = experts_[id];
            if (expert.claimed || expert.ahead || expert.state == State::leaving) continue;
            aside += expert.size;
            if (aside > budget_ / 2) return;
            if (expert.state == State::resident) {
                take_from_list(expert);
                expert.ahead = true;
                put_into_list(id);
            } else if (expert.state == State::absent) {
                expert.ahead = expert.read_ahead = true;  // before start, which must not take experts set aside
                if (!start(id)) {
                    expert.ahead = expert.read_ahead = false;
                    return;
                }
            }
        }
}

void ExpertResidency::take_from_list(Expert& expert) {
    (expert.ahead ? ahead_ : unused_).erase(expert.place);
    (expert.ahead ? ahead_bytes_ : unused_bytes_) -= expert.size;
}

void ExpertResidency::put_into_list(size_t id) {
    Expert& expert = experts_[id];
    std::list<size_t>& list = expert.ahead ? ahead_ : unused_;
    expert.place = list.insert(list.end(), id);
    (expert.ahead ? ahead_bytes_ : unused_bytes_) += expert.size;
}

// Hands an absent expert to the threads, with the least recently used ones that make room for it. False if the budget
// has no room for it yet.
bool ExpertResidency::start(size_t id) {
    Expert& expert = experts_[id];
    if (expert.state != State::absent) return false;
    const int64_t taken = std::min(free_, expert.size), wanted = expert.size - taken;
    if (wanted > unused_bytes_ + (expert.claimed ? ahead_bytes_ : 0)) return false;
    free_ -= taken;
    Job job{id, {}, 0};
    int64_t found = 0;
    while (found < wanted) {
        const size_t victim = unused_.empty() ? ahead_.back() : unused_.front();  // ahead: the one needed last
        Expert& leaving = experts_[victim];
        take_from_list(leaving);
        leaving.ahead = leaving.read_ahead = false;
        leaving.state = State::leaving;
        found += leaving.size;
        job.victims.push_back(victim);
    }
    job.surplus = found - wanted;
    expert.state = State::reading;
    counts_.bytes_read += expert.size;
    counts_.evictions += static_cast<int64_t>(job.victims.size());
    counts_.peak_bytes = std::max(counts_.peak_bytes, budget_ - free_);
    jobs_.push_back(std::move(job));
    jobs_changed_.notify_one();
    return true;
}

void ExpertResidency::start_waiting() {
    while (!waiting_.empty() && start(waiting_.front())) waiting_.pop_front();
}

// Pages of leaving experts that no other resident expert has a part of.
std::vector<Pages> ExpertResidency::release_pages(const std::vector<size_t>& victims) {
    std::vector<Pages> pages;
    const int64_t page = sysconf(_SC_PAGESIZE);
    auto is_free = [&](uintptr_t place) {
        auto found = holders_.find(place);
        return found == holders_.end() || found->second == 0;
    };
    for (size_t id : victims)
        for (const Pages& p : experts_[id].pages)
            for (uintptr_t border : {p.first, p.first + static_cast<uintptr_t>(p.size - page)})
                if (--holders_[border] == 0) holders_.erase(border);
    for (size_t id : victims)
        for (Pages p : experts_[id].pages) {
            if (!is_free(p.first)) {
                p.first += static_cast<uintptr_t>(page);
                p.offset += page;
                p.size -= page;
            }
            if (p.size > 0 && !is_free(p.first + static_cast<uintptr_t>(p.size - page))) p.size -= page;
            if (p.size > 0) pages.push_back(p);
        }
    return pages;
}

void ExpertResidency::hold_pages(const Expert& expert) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    for (const Pages& p : expert.pages)
        for (uintptr_t border : {p.first, p.first + static_cast<uintptr_t>(p.size - page)}) ++holders_[border];
}

void ExpertResidency::work() {
    std::unique_lock lock(mutex_);
    while (true) {
        jobs_changed_.wait(lock, [&] { return closing_ || !jobs_.empty(); });
        if (closing_) return;
        const Job job = std::move(jobs_.front());
        jobs_.pop_front();
        Expert& expert = experts_[job.expert];
        const std::vector<Pages> leaving = release_pages(job.victims);
        hold_pages(expert);
        lock.unlock();
        for (const Pages& p : leaving) drop(p);
        lock.lock();
        for (size_t victim : job.victims) experts_[victim].state = State::absent;
        free_ += job.surplus;
        start_waiting();
        lock.unlock();
        read(expert);
        lock.lock();
        expert.state = State::resident;
        if (!expert.claimed) put_into_list(job.expert);
        start_waiting();
        experts_changed_.notify_all();
    }
}

void ExpertResidency::drop(const Pages& p) const {
#ifdef __linux__
    // Between the two calls a fault in a neighbouring expert may map pages again, and mapped pages stay cached.
    constexpr int TRIES = 3;
    for (int i = 0; i < TRIES; ++i) {
        madvise(address(p.first), static_cast<size_t>(p.size), MADV_DONTNEED);
        // Does nothing for pages that another process has mapped or that are not written to the disk yet.
        posix_fadvise(files_[static_cast<size_t>(p.file)], p.offset, p.size, POSIX_FADV_DONTNEED);
        if (!has_cached_ends(p)) return;
    }
#else
    static_cast<void>(p);
#endif
}

void ExpertResidency::read(const Expert& expert) const {
#ifdef __linux__
    for (const Pages& p : expert.pages) madvise(address(p.first), static_cast<size_t>(p.size), MADV_WILLNEED);
    for (const Pages& p : expert.pages) {
        int result;
        do result = madvise(address(p.first), static_cast<size_t>(p.size), MADV_POPULATE_READ);
        while (result != 0 && (errno == EINTR || errno == EAGAIN));
        // Another error is left to the kernels' own read: an old system reads the pages then, and a file that was cut
        // short ends the process there.
    }
#else
    static_cast<void>(expert);
#endif
}

ExpertClaim::ExpertClaim(ExpertResidency& residency, int64_t layer, std::vector<int32_t>& experts)
    : residency_(residency), turn_(residency.turn_), first_(static_cast<size_t>(layer * residency.experts_per_layer_)) {
    using State = ExpertResidency::State;
    std::lock_guard lock(residency_.mutex_);
    auto rank = [&](int32_t e) {
        const State state = residency_.experts_[id(e)].state;
        return state == State::resident ? 0 : state == State::reading ? 1 : 2;
    };
    std::stable_sort(experts.begin(), experts.end(), [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
    for (int32_t e : experts) {
        auto& expert = residency_.experts_[id(e)];
        const bool hit = rank(e) < 2;
        ++(hit ? residency_.counts_.hits : residency_.counts_.misses);
        residency_.counts_.read_ahead_hits += hit && expert.read_ahead;
        if (expert.state == State::resident) residency_.take_from_list(expert);
        expert.ahead = expert.read_ahead = false;
        expert.claimed = true;
        if (!hit) residency_.waiting_.push_back(id(e));
    }
    claimed_ = experts;
    residency_.start_waiting();
}

ExpertClaim::~ExpertClaim() {
    // Usually all are done. After an exception the rest must not stay claimed.
    std::lock_guard lock(residency_.mutex_);
    residency_.waiting_.clear();
    for (int32_t e : claimed_) {
        auto& expert = residency_.experts_[id(e)];
        if (expert.claimed && expert.state == ExpertResidency::State::resident) residency_.put_into_list(id(e));
        expert.claimed = false;
    }
}

void ExpertClaim::wait(int32_t expert) {
    std::unique_lock lock(residency_.mutex_);
    const auto& wanted = residency_.experts_[id(expert)];
    residency_.experts_changed_.wait(lock, [&] { return wanted.state == ExpertResidency::State::resident; });
}

std::vector<int32_t> ExpertClaim::take_ready(std::vector<int32_t>& experts) {
    std::unique_lock lock(residency_.mutex_);
    std::vector<int32_t> ready;
    residency_.experts_changed_.wait(lock, [&] {
        auto is_resident = [&](int32_t e) {
            return residency_.experts_[id(e)].state == ExpertResidency::State::resident;
        };
        auto end = std::stable_partition(experts.begin(), experts.end(), is_resident);
        ready.assign(experts.begin(), end);
        experts.erase(experts.begin(), end);
        return !ready.empty();
    });
    return ready;
}

void ExpertClaim::done(int32_t expert) {
    std::lock_guard lock(residency_.mutex_);
    auto& used = residency_.experts_[id(expert)];
    used.claimed = false;
    residency_.put_into_list(id(expert));
    residency_.start_waiting();
}

}  // namespace dsv4
