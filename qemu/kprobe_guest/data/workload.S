# Known work for the guest: exactly N raw system calls, and little else. x86-64 Linux, no C library.
#
#   workload syscall NR N [ARG...]   N times the system call NR (-1: for ever). ARG is a number, s:STRING (passed by
#                                    address), or b: (the address of a buffer of 64 KiB)
#   workload syscall NR - [ARG...]   the same for each line "N" of the input
#   workload timed NR - [ARG...]     that, with the ticks (rdtsc) at the beginning and of every 20 calls
#   workload spin SECONDS            a loop in user mode; 0 is for ever
#   workload int3                    a breakpoint of user mode's own, and whether its SIGTRAP arrived
#   workload part NAME N             N times system calls of one kind (workload_parts.S)
#   workload serve                   the same for each line "NAME N WORKERS" of the input
#   workload bpf fentry|fexit ID     count calls of a function by a BPF program (workload_bpf.S)
#   workload none                    nothing
#
# Numbers are decimal or 0x hexadecimal. Prints "workload: N calls done" at the end.

        .intel_syntax noprefix
        .set    SYS_write, 1
        .set    SYS_rt_sigaction, 13
        .set    SYS_exit, 60
        .set    SYS_clock_gettime, 228
        .set    CHUNK, 20                       # calls that are timed together
        .set    MOST_CHUNKS, 1000

        .globl  _start, usage, exit, number, same, print, print_number, flush, handler, restorer, read_line, leave
        .text
_start:
        mov     r15, [rsp]                      # argc
        lea     r14, [rsp + 8]                  # argv
        cmp     r15, 2
        jb      usage
        mov     rdi, [r14 + 8]
        lea     rsi, [rip + word_syscall]
        call    same
        je      do_syscall
        lea     rsi, [rip + word_timed]
        call    same
        sete    [rip + timed]
        je      do_syscall
        lea     rsi, [rip + word_spin]
        call    same
        je      do_spin
        lea     rsi, [rip + word_int3]
        call    same
        je      do_int3
        lea     rsi, [rip + word_part]
        call    same
        je      do_part
        lea     rsi, [rip + word_serve]
        call    same
        je      do_serve
        lea     rsi, [rip + word_bpf]
        call    same
        je      do_bpf
        xor     ebx, ebx
        lea     rsi, [rip + word_none]
        call    same
        je      leave
usage:  lea     rsi, [rip + text_usage]
        call    print
        mov     edi, 2
        jmp     exit

# workload syscall NR N ARG...: the loop is the call and a count, nothing else enters the kernel.
do_syscall:
        cmp     r15, 4
        jb      usage
        mov     rdi, [r14 + 16]
        call    number
        mov     r12, rax                        # NR
        mov     rdi, [r14 + 24]
        xor     eax, eax
        cmp     word ptr [rdi], 0x2d            # "-"
        sete    [rip + asked]
        je      5f
        call    number
5:      mov     r13, rax                        # N
        xor     ebx, ebx
1:      lea     rax, [rbx + 4]                  # argv[4 + i] is argument i
        cmp     rax, r15
        jae     2f
        cmp     ebx, 6
        jae     usage
        mov     rdi, [r14 + rax * 8]
        call    argument
        lea     rcx, [rip + arguments]
        mov     [rcx + rbx * 8], rax
        inc     ebx
        jmp     1b
2:      cmp     byte ptr [rip + asked], 0
        je      6f
        call    read_line
        call    number
        mov     r13, rax
6:      mov     rbp, r13
        mov     dword ptr [rip + chunks], 0
        mov     ebx, CHUNK
        call    stamp
        mov     [rip + begin], rdx
        test    rbp, rbp
        jz      4f
3:      mov     rdi, [rip + arguments]
        mov     rsi, [rip + arguments + 8]
        mov     rdx, [rip + arguments + 16]
        mov     r10, [rip + arguments + 24]
        mov     r8, [rip + arguments + 32]
        mov     r9, [rip + arguments + 40]
        mov     rax, r12
        syscall
        mov     [rip + last_result], rax
        dec     ebx
        jz      8f
9:      dec     rbp
        jnz     3b
4:      lea     rsi, [rip + text_workload]
        call    print
        mov     rax, r13
        call    print_number
        lea     rsi, [rip + text_done]
        call    print
        mov     rax, [rip + last_result]
        call    print_number
        cmp     byte ptr [rip + timed], 0
        je      0f
        call    print_chunks
0:        lea     rsi, [rip + text_newline]
        call    print
        cmp     byte ptr [rip + asked], 0
        jne     7f
        xor     edi, edi
        jmp     exit
7:      call    flush
        jmp     2b
8:      mov     ebx, CHUNK
        cmp     byte ptr [rip + timed], 0
        je      9b
        call    stamp
        mov     ecx, [rip + chunks]
        cmp     ecx, MOST_CHUNKS
        jae     9b
        lea     rdx, [rip + ticks]
        mov     [rdx + rcx * 8], rax
        inc     dword ptr [rip + chunks]
        jmp     9b

# rax = the ticks since the last stamp
stamp:  rdtsc
        shl     rdx, 32
        or      rdx, rax
        mov     rax, rdx
        sub     rax, [rip + last_stamp]
        mov     [rip + last_stamp], rdx
        ret

print_chunks:
        lea     rsi, [rip + text_space]
        call    print
        mov     rax, [rip + begin]
        call    print_number
        xor     ebx, ebx
1:      cmp     ebx, [rip + chunks]
        je      2f
        lea     rsi, [rip + text_space]
        call    print
        lea     rax, [rip + ticks]
        mov     rax, [rax + rbx * 8]
        call    print_number
        inc     ebx
        jmp     1b
2:      ret

# workload spin SECONDS: a million turns, then a look at the clock.
do_spin:
        cmp     r15, 3
        jb      usage
        mov     rdi, [r14 + 16]
        call    number
        mov     r13, rax
        call    seconds
        add     r13, rax                        # the end
        mov     r12, r13
        sub     r12, rax                        # 0: no end
1:      mov     ecx, 1000000
2:      dec     ecx
        jnz     2b
        test    r12, r12
        jz      1b
        call    seconds
        cmp     rax, r13
        jb      1b
        lea     rsi, [rip + text_spun]
        call    print
        xor     edi, edi
        jmp     exit

do_int3:
        mov     eax, SYS_rt_sigaction
        mov     edi, 5                          # SIGTRAP
        lea     rsi, [rip + action]
        xor     edx, edx
        mov     r10d, 8
        syscall
        int3
        cmp     dword ptr [rip + trapped], 1
        jne     1f
        lea     rsi, [rip + text_trapped]
        call    print
        xor     edi, edi
        jmp     exit
1:      lea     rsi, [rip + text_not_trapped]
        call    print
        mov     edi, 1

# edi = the exit status
exit:   mov     ebx, edi
        call    flush
leave:  mov     eax, SYS_exit
        mov     edi, ebx
        syscall

# rdi = the next line of the input, without its end; at the end of the input the process ends
read_line:
        xor     eax, eax                        # read
        xor     edi, edi
        lea     rsi, [rip + input]
        mov     edx, 255
        syscall
        xor     ebx, ebx
        test    rax, rax
        jle     leave
        lea     rdi, [rip + input]
        mov     byte ptr [rdi + rax - 1], 0
        ret

# write the line
flush:  mov     eax, SYS_write
        mov     edi, 1
        lea     rsi, [rip + line]
        mov     rdx, [rip + line_end]
        sub     rdx, rsi
        mov     [rip + line_end], rsi
        syscall
        ret

handler:
        inc     dword ptr [rip + trapped]
        ret
restorer:
        mov     eax, 15                         # rt_sigreturn
        syscall

# rax = seconds of the monotonic clock
seconds:
        mov     eax, SYS_clock_gettime
        mov     edi, 1
        lea     rsi, [rip + timespec]
        syscall
        mov     rax, [rip + timespec]
        ret

# ZF = the strings at rdi and rsi are the same; rdi is kept
same:   push    rdi
1:      mov     al, [rdi]
        cmp     al, [rsi]
        jne     2f
        inc     rdi
        inc     rsi
        test    al, al
        jnz     1b
2:      pop     rdi
        ret

# rax = the argument at rdi: an address for s: and b:, else a number
argument:
        cmp     word ptr [rdi], 0x3a62          # "b:"
        lea     rax, [rip + buffer]
        je      1f
        cmp     word ptr [rdi], 0x3a73          # "s:"
        lea     rax, [rdi + 2]
        jne     number
1:      ret

# rax = the number at rdi; anything else is a mistake of the caller
number: xor     eax, eax
        cmp     byte ptr [rdi], '-'
        jne     1f
        inc     rdi
        call    1f
        neg     rax
        ret
1:      cmp     word ptr [rdi], 0x7830          # "0x"
        je      hexadecimal
        cmp     byte ptr [rdi], 0
        je      usage
2:      movzx   ecx, byte ptr [rdi]
        test    ecx, ecx
        jz      4f
        sub     ecx, '0'
        cmp     ecx, 9
        ja      usage
        imul    rax, rax, 10
        add     rax, rcx
        inc     rdi
        jmp     2b
hexadecimal:
        add     rdi, 2
        cmp     byte ptr [rdi], 0
        je      usage
3:      movzx   ecx, byte ptr [rdi]
        test    ecx, ecx
        jz      4f
        or      ecx, 0x20
        sub     ecx, '0'
        cmp     ecx, 9
        jbe     5f
        sub     ecx, 'a' - '0' - 10
        cmp     ecx, 10
        jb      usage
        cmp     ecx, 15
        ja      usage
5:      shl     rax, 4
        add     rax, rcx
        inc     rdi
        jmp     3b
4:      ret

# append the string at rsi to the line that exit writes, in one piece: one write() a run, whatever is printed
print:  mov     rdi, [rip + line_end]
1:      mov     al, [rsi]
        test    al, al
        jz      2f
        mov     [rdi], al
        inc     rsi
        inc     rdi
        jmp     1b
2:      mov     [rip + line_end], rdi
        ret

# append rax, signed decimal
print_number:
        lea     rsi, [rip + digits_end]
        mov     r8, rax
        test    rax, rax
        jns     1f
        neg     rax
1:      mov     ecx, 10
2:      xor     edx, edx
        div     rcx
        add     dl, '0'
        dec     rsi
        mov     [rsi], dl
        test    rax, rax
        jnz     2b
        test    r8, r8
        jns     print
        dec     rsi
        mov     byte ptr [rsi], '-'
        jmp     print

        .data
action: .quad   handler, 0x04000000, restorer, 0        # SA_RESTORER
arguments:
        .fill   6, 8, 0
last_result:
        .quad   0
timespec:
        .quad   0, 0
trapped:
        .long   0
chunks: .long   0
last_stamp:
        .quad   0
begin:  .quad   0
asked:  .byte   0
timed:  .byte   0
line_end:
        .quad   line
        .fill   24, 1, 0
digits_end:
        .byte   0

        .bss
        .balign 4096
buffer: .fill   65536, 1, 0
ticks:  .fill   MOST_CHUNKS, 8, 0
line:   .fill   256 + MOST_CHUNKS * 24, 1, 0
input:  .fill   256, 1, 0

        .section .rodata
word_syscall:   .asciz "syscall"
word_timed:     .asciz "timed"
word_spin:      .asciz "spin"
word_int3:      .asciz "int3"
word_part:      .asciz "part"
word_serve:     .asciz "serve"
word_bpf:       .asciz "bpf"
word_none:      .asciz "none"
text_workload:  .asciz "workload: "
text_done:      .asciz " calls done, last result "
text_space:     .asciz " "
text_newline:   .asciz "\n"
text_spun:      .asciz "workload: spin done\n"
text_trapped:   .asciz "workload: SIGTRAP arrived\n"
text_not_trapped: .asciz "workload: SIGTRAP did not arrive\n"
text_usage:     .asciz "usage: workload syscall NR N|- [ARG...] | timed NR N|- [ARG...] | spin SECONDS | int3 | part NAME N | serve | bpf fentry|fexit ID | none\n"
