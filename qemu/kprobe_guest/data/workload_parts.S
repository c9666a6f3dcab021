# System calls of many kinds, for the workload program: `workload part NAME N` makes N rounds of one table of calls,
# `workload serve` does so for each line of its input.
#
# A round leaves everything as it was (files are gone, children have ended), so that each is the same calls again. What
# a call must return is part of its step: the program counts those that returned something else.
#
# A step is nine quads: the number of the call, six arguments, an address that the result is kept at unless it is 0 (0:
# nowhere), and what must come back: 0 is no error, E a certain error, ANY anything. Some steps are no calls, see below.

        .intel_syntax noprefix

        .set    LOAD32, 0x4c32 << 48            # + ADDRESS as an argument: the 32 bits that are there
        .set    LOAD64, 0x4c64 << 48
        .set    ANY, -1
        .set    ENOENT, 2
        .set    EAGAIN, 11
        .set    ETIMEDOUT, 110

        .set    END, -1                         # of the table
        .set    CHILD, -2                       # in the child (the last call returned 0) go on with the table at A
        .set    TOUCH, -3                       # write to the first byte of B pages from A on
        .set    EXPECT, -4                      # the 32 bits at A must be B
        .set    SPIN, -5                        # stay in user mode for A ticks of the TSC

.macro  sys     number, a=0, b=0, c=0, d=0, e=0, f=0, keep=0, error=0
        .quad   \number, \a, \b, \c, \d, \e, \f, \keep, \error
.endm

.macro  times   count, number, a=0, b=0, c=0, d=0, e=0, f=0
        .rept   \count
        sys     \number, \a, \b, \c, \d, \e, \f
        .endr
.endm

        .globl  do_part, do_serve
        .text

# workload part NAME N
do_part:
        cmp     r15, 4
        jne     usage
        mov     rdi, [r14 + 24]
        call    number
        mov     r13, rax
        mov     rdi, [r14 + 16]
        call    rounds
        call    report
        xor     edi, edi
        cmp     dword ptr [rip + wrong], 0
        setne   dil
        jmp     exit

# workload serve: for each line "NAME N WORKERS" of the input that many processes make N rounds each, at the same time,
# each in a directory of its own; then one line of report. The process itself is the first worker.
do_serve:
        call    read_line
        mov     rsi, rdi
        lea     rdi, [rip + fields]
        mov     [rdi], rsi
1:      mov     al, [rsi]
        test    al, al
        jz      2f
        inc     rsi
        cmp     al, ' '
        jne     1b
        mov     byte ptr [rsi - 1], 0
        add     rdi, 8
        mov     [rdi], rsi
        jmp     1b
2:      mov     dword ptr [rip + wrong], 0
        mov     rdi, [rip + fields + 8]
        call    number
        mov     r13, rax
        mov     rdi, [rip + fields + 16]
        call    number
        mov     r14, rax
        mov     byte ptr [rip + place_number], '0'
3:      dec     r14                             # another worker
        jz      4f
        inc     byte ptr [rip + place_number]
        mov     eax, 57                         # fork
        syscall
        test    rax, rax
        jnz     3b
        mov     eax, 83                         # mkdir: it may be there
        lea     rdi, [rip + place]
        mov     esi, 0755
        syscall
        mov     eax, 80                         # chdir
        lea     rdi, [rip + place]
        syscall
        mov     rdi, [rip + fields]
        call    rounds
        mov     edi, [rip + wrong]
        jmp     leave_quietly
4:      mov     rdi, [rip + fields]
        call    rounds
        mov     r14b, [rip + place_number]
5:      cmp     r14b, '0'
        je      6f
        mov     eax, 61                         # wait4
        mov     rdi, -1
        lea     rsi, [rip + status]
        xor     edx, edx
        xor     r10d, r10d
        syscall
        cmp     dword ptr [rip + status], 0
        setne   al
        movzx   eax, al
        add     [rip + wrong], eax
        dec     r14b
        jmp     5b
6:      call    report
        call    flush
        jmp     do_serve

leave_quietly:
        mov     eax, 60                         # exit
        syscall

# Make r13 rounds of the part whose name is at rdi.
rounds: lea     r12, [rip + parts]
1:      mov     rsi, [r12]
        test    rsi, rsi
        jz      usage
        call    same
        je      2f
        add     r12, 16
        jmp     1b
2:      mov     rbp, r13
3:      test    rbp, rbp
        jz      4f
        mov     rbx, [r12 + 8]
        call    steps
        dec     rbp
        jmp     3b
4:      ret

# Append to the line that exit or flush writes.
report: lea     rsi, [rip + text_part]
        call    print
        mov     rax, r13
        call    print_number
        lea     rsi, [rip + text_rounds]
        call    print
        movsxd  rax, dword ptr [rip + wrong]
        call    print_number
        lea     rsi, [rip + text_wrong]
        call    print
        cmp     dword ptr [rip + wrong], 0
        je      1f
        lea     rsi, [rip + text_call]
        call    print
        mov     rax, [rip + wrong_call]
        call    print_number
        lea     rsi, [rip + text_returned]
        call    print
        mov     rax, [rip + wrong_result]
        call    print_number
1:      lea     rsi, [rip + text_end]
        jmp     print

# Do the steps from rbx on. Only registers: threads do steps at the same time. r15 = what the last call returned
steps:  mov     rax, [rbx]
        cmp     rax, END
        je      9f
        cmp     rax, CHILD
        je      5f
        cmp     rax, TOUCH
        je      6f
        cmp     rax, EXPECT
        je      8f
        cmp     rax, SPIN
        je      10f
        mov     rax, [rbx + 48]
        call    value
        mov     r9, rax
        mov     rax, [rbx + 40]
        call    value
        mov     r8, rax
        mov     rax, [rbx + 32]
        call    value
        mov     r10, rax
        mov     rax, [rbx + 24]
        call    value
        mov     rdx, rax
        mov     rax, [rbx + 16]
        call    value
        mov     rsi, rax
        mov     rax, [rbx + 8]
        call    value
        mov     rdi, rax
        mov     rax, [rbx]
        syscall
        mov     r15, rax
        mov     rcx, [rbx + 56]
        test    rcx, rcx
        jz      1f
        test    rax, rax                        # a child in the same memory leaves alone what its parent keeps
        jz      1f
        mov     [rcx], rax
1:      mov     rcx, [rbx + 64]
        cmp     rcx, ANY
        je      4f
        test    rcx, rcx
        jz      2f
        add     rcx, rax                        # a certain error: -E
        jz      4f
        jmp     3f
2:      cmp     rax, -4095                      # an error is -4095 to -1
        jb      4f
3:      lock inc dword ptr [rip + wrong]
        mov     rcx, [rbx]
        mov     [rip + wrong_call], rcx
        mov     [rip + wrong_result], rax
4:      add     rbx, 72
        jmp     steps
5:      test    r15, r15
        jnz     4b
        mov     rbx, [rbx + 8]
        jmp     steps
6:      mov     rax, [rbx + 8]
        call    value
        mov     rcx, [rbx + 16]
7:      inc     byte ptr [rax]
        add     rax, 4096
        dec     rcx
        jnz     7b
        jmp     4b
8:      mov     rcx, [rbx + 8]
        movsxd  rax, dword ptr [rcx]
        cmp     rax, [rbx + 16]
        je      4b
        jmp     3b
10:     rdtsc
        shl     rdx, 32
        lea     rcx, [rax + rdx]
        add     rcx, [rbx + 8]
11:     rdtsc
        shl     rdx, 32
        add     rax, rdx
        cmp     rax, rcx
        jb      11b
        jmp     4b
9:      ret

# rax = the value of the argument rax; rcx is lost
value:  mov     rcx, rax
        shr     rcx, 48
        cmp     ecx, 0x4c32
        je      1f
        cmp     ecx, 0x4c64
        je      2f
        ret
1:      shl     rax, 16
        shr     rax, 16
        movsxd  rax, dword ptr [rax]
        ret
2:      shl     rax, 16
        shr     rax, 16
        mov     rax, [rax]
        ret

        .data
        .balign 8
parts:  .quad   name_files, files, name_names, names, name_pipes, pipes, name_memory, memory
        .quad   name_processes, processes, name_signals, signals, name_futexes, futexes, name_timers, timers
        .quad   name_tasks, tasks, name_sockets, sockets, name_identity, identity, name_copies, copies
        .quad   name_spin, spin
        .quad   0

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl.

files:  sys     257, -100, file, 0x242, 0644, keep=fd                   # openat(O_RDWR | O_CREAT | O_TRUNC)
        sys     1, LOAD32 + fd, space, 4096                             # write
        sys     18, LOAD32 + fd, space, 512, 8192                       # pwrite64
        sys     8, LOAD32 + fd, 0, 0                                    # lseek
        sys     0, LOAD32 + fd, space, 4096                             # read
        sys     17, LOAD32 + fd, space, 512, 100                        # pread64
        sys     20, LOAD32 + fd, vectors, 2                             # writev
        sys     8, LOAD32 + fd, 0, 0
        sys     19, LOAD32 + fd, vectors, 2                             # readv
        sys     5, LOAD32 + fd, space                                   # fstat
        sys     138, LOAD32 + fd, space                                 # fstatfs
        sys     77, LOAD32 + fd, 2000                                   # ftruncate
        sys     285, LOAD32 + fd, 0, 0, 8192                            # fallocate
        sys     221, LOAD32 + fd, 0, 0, 2                               # fadvise64
        sys     74, LOAD32 + fd                                         # fsync
        sys     75, LOAD32 + fd                                         # fdatasync
        sys     73, LOAD32 + fd, 2                                      # flock(LOCK_EX)
        sys     73, LOAD32 + fd, 8                                      # flock(LOCK_UN)
        sys     72, LOAD32 + fd, 3                                      # fcntl(F_GETFL)
        sys     72, LOAD32 + fd, 6, region                              # fcntl(F_SETLK)
        sys     32, LOAD32 + fd, keep=fd2                               # dup
        sys     292, LOAD32 + fd2, 50, 0                                # dup3
        sys     3, 50                                                   # close
        sys     3, LOAD32 + fd2
        sys     3, LOAD32 + fd
        sys     87, file                                                # unlink
        sys     END

names:  sys     83, directory, 0755                                     # mkdir
        sys     80, directory                                           # chdir
        sys     257, -100, file, 0x242, 0644, keep=fd
        sys     3, LOAD32 + fd
        sys     4, file, space                                          # stat
        sys     6, file, space                                          # lstat
        sys     262, -100, file, space, 0                               # newfstatat
        sys     332, -100, file, 0, 0x7ff, space                        # statx
        sys     21, file, 4                                             # access
        sys     21, nowhere, 4, error=ENOENT
        sys     90, file, 0600                                          # chmod
        sys     92, file, 0, 0                                          # chown
        sys     280, -100, file, 0, 0                                   # utimensat
        sys     76, file, 5000                                          # truncate
        sys     86, file, second                                        # link
        sys     82, second, third                                       # rename
        sys     88, file, second                                        # symlink
        sys     89, second, space, 256                                  # readlink
        sys     4, second, space
        sys     133, fifo, 0010600, 0                                   # mknod
        sys     257, -100, dot, 0x10000, 0, keep=fd                     # openat(O_DIRECTORY)
        sys     217, LOAD32 + fd, space, 4096                           # getdents64
        sys     217, LOAD32 + fd, space, 4096
        sys     3, LOAD32 + fd
        sys     79, space, 4096                                         # getcwd
        sys     137, dot, space                                         # statfs
        sys     294, 0, keep=fd                                         # inotify_init1
        sys     254, LOAD32 + fd, dot, 0xfff                            # inotify_add_watch
        sys     87, file
        sys     87, second
        sys     87, third
        sys     87, fifo
        sys     0, LOAD32 + fd, space, 4096
        sys     3, LOAD32 + fd
        sys     80, up
        sys     84, directory                                           # rmdir
        sys     END

pipes:  sys     293, pair, 0                                            # pipe2
        sys     293, pair2, 0
        sys     1, LOAD32 + pair + 4, space, 3000
        sys     16, LOAD32 + pair, 0x541b, space                        # ioctl(FIONREAD)
        sys     276, LOAD32 + pair, LOAD32 + pair2 + 4, 1000, 0         # tee
        sys     275, LOAD32 + pair, 0, LOAD32 + pair2 + 4, 0, 1000, 0   # splice
        sys     0, LOAD32 + pair, space, 4096
        sys     278, LOAD32 + pair2 + 4, vectors, 2, 0                  # vmsplice
        sys     0, LOAD32 + pair2, space, 65536
        sys     72, LOAD32 + pair, 1031, 8192                           # fcntl(F_SETPIPE_SZ)
        sys     1, LOAD32 + pair + 4, space, 100
        sys     7, polled, 1, 0                                         # poll
        sys     271, polled, 1, brief, 0, 0                             # ppoll
        sys     23, 1, space, 0, 0, nothing, error=ANY                  # select: of whatever bits are there
        sys     291, 0, keep=fd                                         # epoll_create1
        sys     233, LOAD32 + fd, 1, LOAD32 + pair, event               # epoll_ctl(EPOLL_CTL_ADD)
        sys     232, LOAD32 + fd, space, 8, 0                           # epoll_wait
        sys     0, LOAD32 + pair, space, 100
        sys     232, LOAD32 + fd, space, 8, 1
        sys     233, LOAD32 + fd, 2, LOAD32 + pair, 0                   # epoll_ctl(EPOLL_CTL_DEL)
        sys     3, LOAD32 + fd
        sys     290, 0, 0, keep=fd                                      # eventfd2
        sys     1, LOAD32 + fd, one, 8
        sys     0, LOAD32 + fd, space, 8
        sys     3, LOAD32 + fd
        sys     3, LOAD32 + pair
        sys     3, LOAD32 + pair + 4
        sys     3, LOAD32 + pair2
        sys     3, LOAD32 + pair2 + 4
        sys     END

memory: sys     9, 0, 0x40000, 3, 0x22, -1, 0, keep=map                 # mmap(MAP_PRIVATE | MAP_ANONYMOUS)
        sys     TOUCH, LOAD64 + map, 16
        sys     10, LOAD64 + map, 0x8000, 1                             # mprotect
        sys     10, LOAD64 + map, 0x8000, 3
        sys     28, LOAD64 + map, 0x8000, 4                             # madvise(MADV_DONTNEED)
        sys     TOUCH, LOAD64 + map, 8
        sys     27, LOAD64 + map, 0x40000, space                        # mincore
        sys     149, LOAD64 + map, 0x4000                               # mlock
        sys     150, LOAD64 + map, 0x4000                               # munlock
        sys     25, LOAD64 + map, 0x40000, 0x80000, 1, keep=map         # mremap(MREMAP_MAYMOVE)
        sys     11, LOAD64 + map, 0x80000                               # munmap
        sys     319, file, 0, keep=fd                                   # memfd_create
        sys     77, LOAD32 + fd, 0x8000
        sys     9, 0, 0x8000, 3, 1, LOAD32 + fd, 0, keep=map            # mmap(MAP_SHARED)
        sys     TOUCH, LOAD64 + map, 8
        sys     26, LOAD64 + map, 0x8000, 4                             # msync
        sys     11, LOAD64 + map, 0x8000
        sys     3, LOAD32 + fd
        sys     12, 0, keep=map                                         # brk
        sys     12, LOAD64 + map
        sys     END

processes:
        sys     57, keep=child                                          # fork
        sys     CHILD, leave
        sys     61, LOAD32 + child, status, 0, 0                        # wait4
        sys     EXPECT, status, 0
        sys     58, keep=child                                          # vfork
        sys     CHILD, execute
        sys     61, LOAD32 + child, status, 0, 0
        sys     EXPECT, status, 0
        sys     END
execute:
        sys     59, itself, vector, nothing                             # execve
        sys     60, 1
leave:  sys     60, 0                                                   # exit

signals:
        sys     39, keep=self                                           # getpid
        sys     13, 10, action, 0, 8                                    # rt_sigaction(SIGUSR1)
        sys     62, LOAD32 + self, 10                                   # kill
        sys     14, 0, mask, 0, 8                                       # rt_sigprocmask(SIG_BLOCK)
        sys     234, LOAD32 + self, LOAD32 + self, 10                   # tgkill
        sys     127, space, 8                                           # rt_sigpending
        sys     14, 1, mask, 0, 8                                       # rt_sigprocmask(SIG_UNBLOCK)
        sys     14, 0, mask, 0, 8
        sys     62, LOAD32 + self, 10
        sys     289, -1, mask, 8, 0, keep=fd                            # signalfd4
        sys     0, LOAD32 + fd, space, 128
        sys     3, LOAD32 + fd
        sys     128, mask, 0, nothing, 8, error=EAGAIN                  # rt_sigtimedwait
        sys     14, 1, mask, 0, 8
        sys     131, 0, space                                           # sigaltstack
        sys     57, keep=child
        sys     CHILD, sleeper
        sys     62, LOAD32 + child, 9
        sys     61, LOAD32 + child, status, 0, 0
        sys     EXPECT, status, 9
        sys     END
sleeper:
        sys     34                                                      # pause
        sys     60, 0

futexes:
        sys     202, futex, 1, 1                                        # futex(FUTEX_WAKE)
        sys     202, futex, 0, 7, error=EAGAIN                          # FUTEX_WAIT, not the value
        sys     202, futex, 0, 0, brief, error=ETIMEDOUT
        sys     202, futex, 4, 1, 1, futex2, 0                          # FUTEX_CMP_REQUEUE
        sys     202, futex, 5, 1, 1, futex2, 0x1000001                  # FUTEX_WAKE_OP
        sys     202, futex, 137, 0, nothing, 0, -1, error=ETIMEDOUT     # FUTEX_WAIT_BITSET, until long ago
        sys     202, mutex, 6, 0, 0                                     # FUTEX_LOCK_PI
        sys     202, mutex, 7                                           # FUTEX_UNLOCK_PI
        # A thread: clone(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
        # CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID). Its end clears the word and wakes who waits for it; it may have
        # come before.
        sys     56, 0x350f00, stack_end, tid, tid, 0, keep=child
        sys     CHILD, leave
        sys     202, tid, 0, LOAD32 + child, 0, error=ANY
        sys     273, robust, 24                                         # set_robust_list
        sys     END

timers: sys     228, 0, space                                           # clock_gettime
        sys     228, 1, space
        sys     228, 2, space
        sys     229, 1, space                                           # clock_getres
        sys     96, space, 0                                            # gettimeofday
        sys     201, 0                                                  # time
        sys     100, space                                              # times
        sys     35, brief, 0                                            # nanosleep
        sys     230, 1, 0, brief, 0                                     # clock_nanosleep
        sys     222, 1, sigevent, timer                                 # timer_create(SIGEV_NONE)
        sys     223, LOAD32 + timer, 0, interval, 0                     # timer_settime
        sys     224, LOAD32 + timer, space                              # timer_gettime
        sys     225, LOAD32 + timer                                     # timer_getoverrun
        sys     226, LOAD32 + timer                                     # timer_delete
        sys     283, 1, 0, keep=fd                                      # timerfd_create
        sys     286, LOAD32 + fd, 0, interval, 0                        # timerfd_settime
        sys     0, LOAD32 + fd, space, 8
        sys     287, LOAD32 + fd, space                                 # timerfd_gettime
        sys     3, LOAD32 + fd
        sys     38, 0, later, 0                                         # setitimer
        sys     36, 0, space                                            # getitimer
        sys     38, 0, nothing, 0
        sys     159, adjusted                                           # adjtimex
        sys     END

tasks:  sys     204, 0, 128, space                                      # sched_getaffinity
        sys     203, 0, 128, space                                      # sched_setaffinity
        sys     145, 0                                                  # sched_getscheduler
        sys     143, 0, space                                           # sched_getparam
        sys     144, 0, 0, nothing                                      # sched_setscheduler(SCHED_OTHER)
        sys     148, 0, space                                           # sched_rr_get_interval
        sys     315, 0, space, 56, 0                                    # sched_getattr
        sys     140, 0, 0                                               # getpriority
        sys     141, 0, 0, 0                                            # setpriority
        sys     309, space, space, 0                                    # getcpu
        sys     57, keep=child
        sys     CHILD, yields
        times   8, 24                                                   # sched_yield
        sys     61, LOAD32 + child, status, 0, 0
        sys     EXPECT, status, 0
        sys     END
yields: times   8, 24
        sys     60, 0

sockets:
        sys     53, 1, 1, 0, pair                                       # socketpair(AF_UNIX, SOCK_STREAM)
        sys     44, LOAD32 + pair, space, 1000, 0, 0, 0                 # sendto
        sys     45, LOAD32 + pair + 4, space, 1000, 0, 0, 0             # recvfrom
        sys     46, LOAD32 + pair, message, 0                           # sendmsg
        sys     47, LOAD32 + pair + 4, message, 0                       # recvmsg
        sys     55, LOAD32 + pair, 1, 7, space, four                    # getsockopt(SO_SNDBUF)
        sys     54, LOAD32 + pair, 1, 7, one, 4                         # setsockopt
        sys     51, LOAD32 + pair, space, room                          # getsockname
        sys     52, LOAD32 + pair, space, room                          # getpeername
        sys     48, LOAD32 + pair, 1                                    # shutdown(SHUT_WR)
        sys     3, LOAD32 + pair
        sys     3, LOAD32 + pair + 4
        sys     41, 1, 1, 0, keep=fd                                    # socket(AF_UNIX, SOCK_STREAM)
        sys     49, LOAD32 + fd, unix, 14                               # bind
        sys     50, LOAD32 + fd, 5                                      # listen
        sys     41, 1, 1, 0, keep=fd2
        sys     42, LOAD32 + fd2, unix, 14                              # connect
        sys     288, LOAD32 + fd, 0, 0, 0, keep=fd3                     # accept4
        sys     1, LOAD32 + fd3, space, 100
        sys     0, LOAD32 + fd2, space, 100
        sys     3, LOAD32 + fd
        sys     3, LOAD32 + fd2
        sys     3, LOAD32 + fd3
        sys     87, unix + 2
        sys     41, 2, 2, 0, keep=fd                                    # socket(AF_INET, SOCK_DGRAM)
        sys     49, LOAD32 + fd, local, 16
        sys     51, LOAD32 + fd, local2, room2
        sys     42, LOAD32 + fd, local2, 16
        sys     1, LOAD32 + fd, space, 200
        sys     0, LOAD32 + fd, space, 200
        sys     3, LOAD32 + fd
        sys     END

identity:
        sys     102                                                     # getuid
        sys     104                                                     # getgid
        sys     107                                                     # geteuid
        sys     108                                                     # getegid
        sys     118, space, space, space                                # getresuid
        sys     120, space, space, space                                # getresgid
        sys     117, -1, -1, -1                                         # setresuid
        sys     119, -1, -1, -1                                         # setresgid
        sys     115, 0, 0                                               # getgroups
        sys     110                                                     # getppid
        sys     111                                                     # getpgrp
        sys     121, 0                                                  # getpgid
        sys     124, 0                                                  # getsid
        sys     186                                                     # gettid
        sys     157, 15, file                                           # prctl(PR_SET_NAME)
        sys     157, 16, space                                          # prctl(PR_GET_NAME)
        sys     63, space                                               # uname
        sys     99, space                                               # sysinfo
        sys     97, 7, space                                            # getrlimit
        sys     302, 0, 7, 0, space                                     # prlimit64
        sys     98, 0, space                                            # getrusage
        sys     125, capabilities, space                                # capget
        sys     135, 0xffffffff                                         # personality
        sys     158, 0x1003, space                                      # arch_prctl(ARCH_GET_FS)
        sys     252, 1, 0                                               # ioprio_get
        sys     324, 0, 0                                               # membarrier
        sys     170, host, 5                                            # sethostname
        sys     95, 022                                                 # umask
        sys     END

copies: sys     257, -100, zero, 0, 0, keep=fd
        sys     0, LOAD32 + fd, space, 65536
        sys     3, LOAD32 + fd
        sys     257, -100, null, 1, 0, keep=fd
        sys     1, LOAD32 + fd, space, 65536
        sys     3, LOAD32 + fd
        sys     257, -100, statistics, 0, 0, keep=fd
        sys     0, LOAD32 + fd, space, 4096
        sys     3, LOAD32 + fd
        sys     257, -100, mappings, 0, 0, keep=fd
        sys     0, LOAD32 + fd, space, 4096
        sys     3, LOAD32 + fd
        sys     89, program, space, 256
        sys     39, keep=self
        sys     310, LOAD32 + self, vectors, 2, vectors, 2, 0           # process_vm_readv
        sys     318, space, 256, 0                                      # getrandom
        sys     319, file, 0, keep=fd
        sys     1, LOAD32 + fd, space, 20000
        sys     8, LOAD32 + fd, 0, 0
        sys     0, LOAD32 + fd, space, 20000
        sys     3, LOAD32 + fd
        sys     END

spin:   sys     SPIN, 40000000                                          # 40 ms: QEMU's TSC counts nanoseconds
        sys     END

place:  .ascii  "worker-"
place_number:
        .asciz  "0"
        .balign 8
action: .quad   handler, 0x04000000, restorer, 0                        # SA_RESTORER
mask:   .quad   1 << 9                                                  # SIGUSR1
vectors:
        .quad   space, 1000, space + 2000, 3000
message:
        .quad   0, 0, vectors, 1, 0, 0, 0                               # struct msghdr
region: .short  2, 0                                                    # struct flock: F_UNLCK, SEEK_SET
        .long   0
        .quad   0, 0, 0
event:  .long   1, 0, 0                                                 # struct epoll_event: EPOLLIN
        .balign 8
polled: .quad   0                                                       # struct pollfd of descriptor 0: no events
brief:  .quad   0, 1000                                                 # struct timespec: 1 us
interval:
        .quad   0, 0, 0, 1000                                           # struct itimerspec: once, after 1 us
later:  .quad   0, 0, 1000, 0                                           # struct itimerval: once, after 1000 s
sigevent:
        .quad   0
        .long   0, 1                                                    # SIGEV_NONE
        .fill   6, 8, 0
robust: .quad   robust, 0, 0
one:    .quad   1
four:   .quad   4
room:   .quad   64
room2:  .quad   16
unix:   .short  1                                                       # struct sockaddr_un
        .asciz  "part-socket"
local:  .short  2, 0                                                    # struct sockaddr_in: 127.0.0.1, any port
        .byte   127, 0, 0, 1
        .quad   0
capabilities:
        .long   0x20080522, 0                                           # _LINUX_CAPABILITY_VERSION_3, this process
        .balign 8
vector: .quad   itself, word_none, 0

        .bss
        .balign 4096
space:  .fill   65536, 1, 0
        .balign 16
stack:  .fill   4096, 1, 0
stack_end:
nothing:
        .fill   256, 1, 0                                               # zero as long as nobody writes to it
adjusted:
        .fill   256, 1, 0                                               # struct timex, of no mode
fd:     .quad   0
fd2:    .quad   0
fd3:    .quad   0
pair:   .quad   0
pair2:  .quad   0
map:    .quad   0
status: .quad   0
self:   .quad   0
child:  .quad   0
timer:  .quad   0
futex:  .quad   0
futex2: .quad   0
mutex:  .quad   0
tid:    .quad   0
local2: .quad   0, 0
fields: .quad   0, 0, 0, 0
wrong:  .quad   0
wrong_call:
        .quad   0
wrong_result:
        .quad   0

        .section .rodata
name_files:     .asciz "files"
name_names:     .asciz "names"
name_pipes:     .asciz "pipes"
name_memory:    .asciz "memory"
name_processes: .asciz "processes"
name_signals:   .asciz "signals"
name_futexes:   .asciz "futexes"
name_timers:    .asciz "timers"
name_tasks:     .asciz "tasks"
name_sockets:   .asciz "sockets"
name_identity:  .asciz "identity"
name_copies:    .asciz "copies"
name_spin:      .asciz "spin"
file:           .asciz "part-file"
second:         .asciz "part-second"
third:          .asciz "part-third"
fifo:           .asciz "part-fifo"
directory:      .asciz "part-directory"
dot:            .asciz "."
up:             .asciz ".."
nowhere:        .asciz "/nowhere/at/all"
zero:           .asciz "/dev/zero"
null:           .asciz "/dev/null"
statistics:     .asciz "/proc/self/stat"
mappings:       .asciz "/proc/self/maps"
program:        .asciz "/proc/self/exe"
itself:         .asciz "/bin/workload"
word_none:      .asciz "none"
host:           .asciz "guest"
text_part:      .asciz "workload: "
text_rounds:    .asciz " rounds done, "
text_wrong:     .asciz " calls wrong"
text_call:      .asciz ", call "
text_returned:  .asciz " returned "
text_end:       .asciz "\n"
