# A BPF program at a function's entry or return, for the workload program: `workload bpf fentry|fexit ID`.
#
# ID is the function's number in the kernel's BTF. The program adds 1 to its counter; the counter is printed for each
# line of the input, and at its end the program is gone. bpf(2); numbers are those of include/uapi/linux/bpf.h.

        .intel_syntax noprefix

        .set    SYS_bpf, 321
        .set    MAP_CREATE, 0
        .set    MAP_LOOKUP_ELEM, 1
        .set    PROG_LOAD, 5
        .set    RAW_TRACEPOINT_OPEN, 17
        .set    ATTRIBUTES, 128

        .globl  do_bpf
        .text
do_bpf: cmp     r15, 4
        jne     usage
        mov     rdi, [r14 + 16]
        lea     rsi, [rip + word_fexit]
        call    same
        jne     1f
        inc     dword ptr [rip + attach_type]
        jmp     2f
1:      lea     rsi, [rip + word_fentry]
        call    same
        jne     usage
2:      mov     rdi, [r14 + 24]
        call    number
        mov     [rip + function], eax
        mov     edi, MAP_CREATE
        lea     rsi, [rip + map]
        call    bpf
        mov     [rip + map_number], eax
        mov     [rip + of_map], eax
        mov     edi, PROG_LOAD
        lea     rsi, [rip + load]
        call    bpf
        mov     [rip + program_number], eax
        mov     edi, RAW_TRACEPOINT_OPEN
        lea     rsi, [rip + link]
        call    bpf
        lea     rsi, [rip + text_attached]
        call    print
        call    flush
3:      call    read_line
        mov     edi, MAP_LOOKUP_ELEM
        lea     rsi, [rip + lookup]
        call    bpf
        mov     rax, [rip + counter]
        call    print_number
        lea     rsi, [rip + text_end]
        call    print
        call    flush
        jmp     3b

# rax = bpf(edi, rsi); an error is printed, and is the end
bpf:    mov     ebx, edi
        mov     edx, ATTRIBUTES
        mov     eax, SYS_bpf
        syscall
        test    rax, rax
        js      1f
        ret
1:      mov     r12, rax
        lea     rsi, [rip + text_bpf]
        call    print
        mov     eax, ebx
        call    print_number
        lea     rsi, [rip + text_failed]
        call    print
        mov     rax, r12
        call    print_number
        lea     rsi, [rip + text_end]
        call    print
        mov     edi, 1
        jmp     exit

        .section .rodata
word_fentry:    .asciz "fentry"
word_fexit:     .asciz "fexit"
text_attached:  .asciz "attached\n"
text_bpf:       .asciz "bpf command "
text_failed:    .asciz " failed: "
text_end:       .asciz "\n"
license:        .asciz "GPL"

        .data
        .balign 8
counter: .quad  0
key:    .quad   0
map:    .long   2, 4, 8, 1                      # BPF_MAP_TYPE_ARRAY of one counter
        .fill   ATTRIBUTES - 16, 1, 0
lookup:
map_number:
        .long   0, 0
        .quad   key, counter
        .fill   ATTRIBUTES - 24, 1, 0
load:   .long   26, 6                           # BPF_PROG_TYPE_TRACING, instructions
        .quad   insns, license
        .fill   68 - 24, 1, 0
attach_type:
        .long   24                              # BPF_TRACE_FENTRY; the next is BPF_TRACE_FEXIT
        .fill   108 - 72, 1, 0
function:
        .long   0
        .fill   ATTRIBUTES - 112, 1, 0
link:   .quad   0
program_number:
        .long   0
        .fill   ATTRIBUTES - 12, 1, 0
insns:  .byte   0x18, 0x21, 0, 0                # r1 = the address of the map's value
of_map: .long   0
        .quad   0
        .byte   0xb7, 0x02, 0, 0, 1, 0, 0, 0    # r2 = 1
        .byte   0xdb, 0x21, 0, 0, 0, 0, 0, 0    # lock *(u64 *)(r1 + 0) += r2
        .byte   0xb7, 0x00, 0, 0, 0, 0, 0, 0    # r0 = 0
        .byte   0x95, 0x00, 0, 0, 0, 0, 0, 0    # exit
