#include "python/bus_error.h"

#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <utility>

#include <unistd.h>
#include <csignal>

namespace dsv4 {
namespace {

// Lists are never freed: another thread may be in the handler, reading an earlier list.
std::atomic<const std::vector<MappedRange>*> watched{nullptr};
struct sigaction before;
std::mutex installing;
bool installed = false;

// Calls async-signal-safe functions only.
void on_bus_error(int signal, siginfo_t* info, void* context) {
    const int error = errno;
    const auto place = reinterpret_cast<uintptr_t>(info->si_addr);
    // si_code <= 0: sent by a process, so there is no address.
    if (info->si_code > 0)
        for (const MappedRange& range : *watched.load(std::memory_order_acquire))
            if (place >= range.first && place < range.last) {
                [[maybe_unused]] ssize_t written = write(STDERR_FILENO, range.line.data(), range.line.size());
                break;
            }
    errno = error;
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(signal, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(signal);
    else {
        sigaction(SIGBUS, &before, nullptr);    // the instruction then runs again and ends the process
        if (info->si_code <= 0) raise(signal);  // sent by a process: there is no instruction that would fail again
    }
}

}  // namespace

void watch_bus_errors(std::vector<MappedRange> ranges) {
    watched.store(new std::vector<MappedRange>(std::move(ranges)), std::memory_order_release);
    std::lock_guard lock(installing);
    if (installed) return;
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &before) != 0) throw std::system_error(errno, std::generic_category(), "sigaction");
    installed = true;
}

}  // namespace dsv4
