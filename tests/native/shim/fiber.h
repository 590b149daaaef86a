// A stack of its own for each CUDA thread, and the switch between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shim {

constexpr size_t kStackBytes = 128 << 10;  // AddressSanitizer needs more than plain code

#if defined(__x86_64__)
// Registers that a call must preserve, then the stack pointer. ucontext would make two system calls
// per switch, and one product of a warp is 64 switches.
extern "C" void shim_switch(void** save, void* load);
asm(R"(.text
.weak shim_switch
shim_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
#endif

// resume() runs it until it calls leave(), and so on. Whoever resumes is the same place for all.
class Fiber {
  public:
    void start(void (*entry)()) {
        if (!stack_) {
            stack_.reset(new unsigned char[kStackBytes]);
        }
#if defined(__x86_64__)
        auto** top = reinterpret_cast<void**>(
            (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t{15});
        *--top = nullptr;  // where entry would return to; it never does
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) {
            *--top = nullptr;
        }
        mine_ = top;
#else
        getcontext(&mine_);
        mine_.uc_stack.ss_sp = stack_.get();
        mine_.uc_stack.ss_size = kStackBytes;
        mine_.uc_link = nullptr;
        makecontext(&mine_, entry, 0);
#endif
    }

#if defined(__x86_64__)
    void resume() { shim_switch(&outside(), mine_); }
    void leave() { shim_switch(&mine_, outside()); }

  private:
    static void*& outside() {
        static void* pointer;
        return pointer;
    }
    void* mine_ = nullptr;
#else
    void resume() { swapcontext(&outside(), &mine_); }
    void leave() { swapcontext(&mine_, &outside()); }

  private:
    static ucontext_t& outside() {
        static ucontext_t context;
        return context;
    }
    ucontext_t mine_ = {};
#endif
    std::unique_ptr<unsigned char[]> stack_;
};

}  // namespace shim
