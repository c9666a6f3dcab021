/*
 * A bare-metal x86-64 guest: no kernel, one processor, interrupts off. Loaded by QEMU's multiboot loader at 1 MiB, it
 * goes to long mode, maps itself in the top 2 GiB as kernels do, and calls a handful of small functions for ever.
 * Each function counts its calls; a wrong result, or an exception nobody asked for, is reported on the serial port
 * and is the end.
 *
 * Goes through the C preprocessor (pwntools does that): comments are C's.
 */
        .set    BASE, 0xffffffff80000000        /* virtual = physical + BASE */
        .set    COM1, 0x3f8
        .set    REGION, 0x400000                /* physical; page directory entry 2, see below */

image:  jmp     start64                         /* pwntools puts _start here; the multiboot entry is below */

        .balign 4
header: .long   0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
        .long   header - BASE, image - BASE, 0, 0, entry32 - BASE

        .code32
entry32:
        cli
        mov     esp, offset stack_top - BASE
        mov     eax, cr4
        or      eax, 0x620                      /* PAE, OSFXSR, OSXMMEXCPT */
        mov     cr4, eax
        mov     eax, offset pml4 - BASE
        mov     cr3, eax
        mov     ecx, 0xc0000080                 /* EFER.LME */
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        and     eax, ~4                         /* EM off */
        or      eax, 0x80000003                 /* PG, MP, PE */
        mov     cr0, eax
        lgdt    [gdt_pointer32 - BASE]
        .byte   0xea                            /* jmp 8:start64, at its physical address */
        .long   start64 - BASE
        .word   8

        .code64
start64:
        movabs  rax, offset high
        jmp     rax
high:   lgdt    [rip + gdt_pointer]
        mov     eax, 16
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        xor     eax, eax
        mov     fs, eax
        mov     gs, eax
        lea     rsp, [rip + stack_top]
        /* AVX, where the CPU has it */
        mov     eax, 1
        cpuid
        bt      ecx, 26
        jnc     1f
        mov     rax, cr4
        or      eax, 0x40000                    /* OSXSAVE */
        mov     cr4, rax
        xor     edx, edx
        xor     eax, eax
        mov     ecx, 0
        xgetbv
        or      eax, 3
        mov     ecx, 1
        push    rax
        mov     eax, 1
        cpuid
        pop     rax
        bt      ecx, 28
        jnc     2f
        or      eax, 7
2:      xor     ecx, ecx
        xor     edx, edx
        xsetbv
1:      /* the interrupt descriptor table: vectors 0-31 */
        lea     rdi, [rip + idt]
        lea     rsi, [rip + stubs]
        mov     ecx, 32
1:      mov     rax, rsi
        mov     [rdi], ax
        mov     word ptr [rdi + 2], 8
        mov     word ptr [rdi + 4], 0x8e00      /* present, interrupt gate */
        shr     rax, 16
        mov     [rdi + 6], ax
        shr     rax, 16
        mov     [rdi + 8], eax
        mov     dword ptr [rdi + 12], 0
        add     rdi, 16
        add     rsi, 16
        dec     ecx
        jnz     1b
        lea     rax, [rip + bp_entry]           /* vector 3 is not like the others */
        lea     rdi, [rip + idt + 3 * 16]
        mov     [rdi], ax
        shr     rax, 16
        mov     [rdi + 6], ax
        mov     word ptr [rdi + 4], 0xee00      /* callable from every ring */
        lidt    [rip + idt_pointer]
        lea     rsi, [rip + text_ready]
        call    print

/* ------------------------------------------------------------------ the loop */

        .macro  checked function, expected
        mov     edi, 6
        mov     esi, 7
        mov     rbx, 0x1122334455667788
        mov     rbp, rsp
        call    \function
        lea     rdx, [rip + name_\function]
        cmp     rax, \expected
        jne     broken
        cmp     rbp, rsp
        jne     broken
        mov     rax, 0x1122334455667788
        cmp     rax, rbx
        jne     broken
        .endm

main_loop:
        checked f_nop, 13
        checked f_endbr, 13
        checked f_push, 6
        checked f_mov, 7
        checked f_lea, 0x1234
        checked f_sub, 13
        checked f_test, 6
        checked f_jcc, 10
        checked f_jcc_backwards, 6
        checked f_jcc_near, 7
        checked f_jmp, 13
        checked f_call, 14
        checked f_call_register, 14
        checked f_call_memory, 14
        checked f_tail, 13
        checked f_loop, 6
        checked f_flags, 0x41
        mov     eax, 77
        mov     rbp, rsp
        call    f_ret
        cmp     rbp, rsp
        lea     rdx, [rip + name_f_ret]
        jne     broken
        lock inc qword ptr [rip + count_f_ret]
        cmp     qword ptr [rip + want_int3], 0
        je      1f
        call    f_int3
1:      lock inc qword ptr [rip + rounds]
        jmp     main_loop

/* Each function counts first and returns a value that depends on everything it did. */
        .macro  function name
        .balign 16
\name:
        .endm
        .macro  counted name
        lock inc qword ptr [rip + count_\name]
        .endm

        function f_nop
        .byte   0x0f, 0x1f, 0x44, 0x00, 0x00    /* the nop that compilers leave for ftrace */
        counted f_nop
        lea     eax, [rdi + rsi]
        ret

        function f_endbr
        endbr64
        counted f_endbr
        lea     eax, [rdi + rsi]
        ret

        function f_push
        push    rbp
        mov     rbp, rsp
        push    rbx
        push    rdi
        counted f_push
        xor     ebx, ebx
        pop     rax
        pop     rbx
        pop     rbp
        ret

        function f_mov
        mov     rax, rsi
        counted f_mov
        mov     ecx, 0xdead
        mov     [rip + scratch], rcx
        ret

        function f_lea
        lea     rax, [rip + constant]
        counted f_lea
        mov     rax, [rax]
        cmp     rax, [rip + constant]
        je      1f
        xor     eax, eax
1:      ret

        function f_sub
        sub     rsp, 0x28
        mov     [rsp + 8], rdi
        counted f_sub
        mov     rax, [rsp + 8]
        add     rax, rsi
        add     rsp, 0x28
        ret

        function f_test
        test    rdi, rdi
        jz      1f
        counted f_test
        mov     eax, edi
        ret
1:      xor     eax, eax
        ret

        /* taken and not taken, round by round: 10 comes out either way */
        function f_jcc
        test    byte ptr [rip + rounds], 1
        jz      1f
        mov     eax, 4
        add     eax, edi
        jmp     2f
1:      mov     eax, 3
        add     eax, esi
2:      counted f_jcc
        ret

        /* a conditional jump of two bytes with a negative displacement */
        function f_jcc_backwards
        xor     eax, eax
1:      inc     eax
f_jcc_backwards_site:
        cmp     eax, edi
f_jcc_backwards_jump:
        jne     1b
        counted f_jcc_backwards
        ret

        /* a conditional jump of six bytes, by hand, taken */
        function f_jcc_near
        cmp     edi, esi
f_jcc_near_jump:
        .byte   0x0f, 0x8c                      /* jl */
        .long   1f - . - 4
        xor     eax, eax
        ret
1:      counted f_jcc_near
        mov     eax, esi
        ret

        function f_jmp
        jmp     1f
        ud2
1:      counted f_jmp
        lea     eax, [rdi + rsi]
        ret

        function f_call
        call    leaf
f_call_return:
        counted f_call
        inc     eax
        ret

        function f_call_register
        lea     rax, [rip + leaf]
        call    rax
        counted f_call_register
        inc     eax
        ret

        function f_call_memory
        call    qword ptr [rip + leaf_pointer]
        counted f_call_memory
        inc     eax
        ret

        function f_tail
        counted f_tail
        jmp     leaf

        function f_loop
        xor     eax, eax
        mov     ecx, edi
1:      inc     eax
f_loop_site:
        loop    1b
        counted f_loop
        ret

        /* carry and zero set on purpose, read back: arithmetic flags live across instructions */
        function f_flags
        counted f_flags
        xor     eax, eax
        stc
f_flags_site:
        lea     rcx, [rdi + 1]
        pushfq
        pop     rax
        and     eax, 0x41
        ret

        function f_ret
        ret

        /* a breakpoint of the guest's own, as many as the host writes into want_int3 */
        function f_int3
        mov     rax, [rip + bp_count]
        inc     rax
f_int3_site:
        int3
        lea     rdx, [rip + name_f_int3]
        cmp     rax, [rip + bp_count]
        jne     broken
        lock dec qword ptr [rip + want_int3]
        ret

        function leaf
        lea     eax, [rdi + rsi]
        ret

/* ------------------------------------------------------------------ exceptions */

        /* The guest's own breakpoint handler: right for the int3 at f_int3_site, a failure for any other. */
        .balign 16
bp_entry:
        push    rax
        lea     rax, [rip + f_int3_site + 1]
        cmp     rax, [rsp + 8]
        jne     1f
        lock inc qword ptr [rip + bp_count]
        pop     rax
        iretq
1:      pop     rax
        push    0
        push    3
        jmp     exception

        .balign 16
stubs:  .set    vector, 0
        .rept   32
        .balign 16
        .if     (vector == 8) || (vector == 17) || ((vector >= 10) && (vector <= 14))
        .else
        push    0                               /* those without an error code of their own */
        .endif
        push    vector
        jmp     exception
        .set    vector, vector + 1
        .endr
        .balign 16

exception:
        mov     rbx, [rsp]
        mov     rbp, [rsp + 16]
        lea     rsi, [rip + text_exception]
        call    print
        mov     rax, rbx
        call    print_number
        lea     rsi, [rip + text_at]
        call    print
        mov     rax, rbp
        call    print_number
        jmp     stop

        /* rdx = name of the function that returned something wrong */
broken: mov     rbx, rax
        mov     rbp, rdx
        lea     rsi, [rip + text_broken]
        call    print
        mov     rsi, rbp
        call    print
        lea     rsi, [rip + text_value]
        call    print
        mov     rax, rbx
        call    print_number
stop:   lea     rsi, [rip + text_end]
        call    print
1:      cli
        hlt
        jmp     1b

/* ------------------------------------------------------------------ the serial port */

print:  mov     edx, COM1
1:      mov     al, [rsi]
        test    al, al
        jz      2f
        out     dx, al
        inc     rsi
        jmp     1b
2:      ret

        /* rax in 16 hexadecimal digits */
print_number:
        mov     edx, COM1
        mov     ecx, 16
        mov     rsi, rax
1:      rol     rsi, 4
        mov     eax, esi
        and     eax, 15
        add     al, '0'
        cmp     al, '9'
        jbe     2f
        add     al, 'a' - '0' - 10
2:      out     dx, al
        dec     ecx
        jnz     1b
        ret

text_ready:     .asciz  "guest: ready\n"
text_exception: .asciz  "guest: exception "
text_at:        .asciz  " at "
text_broken:    .asciz  "guest: wrong result of "
text_value:     .asciz  ": "
text_end:       .asciz  "\nguest: stopped\n"

        .macro  named name
name_\name:     .asciz  "\name"
        .endm
        .irp    name, f_nop, f_endbr, f_push, f_mov, f_lea, f_sub, f_test, f_jcc, f_jcc_backwards, f_jcc_near, f_jmp, f_call, f_call_register, f_call_memory, f_tail, f_loop, f_flags, f_ret, f_int3
        named   \name
        .endr

        .balign 8
gdt:    .quad   0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdt_pointer32:
        .word   gdt_pointer32 - gdt - 1
        .long   gdt - BASE
gdt_pointer:
        .word   gdt_pointer32 - gdt - 1
        .quad   gdt
idt_pointer:
        .word   32 * 16 - 1
        .quad   idt

/* ------------------------------------------------------------------ data, away from the code's pages */

        .balign 4096
end_of_text:
        .macro  counter name
count_\name:    .quad   0
        .endm
        .irp    name, f_nop, f_endbr, f_push, f_mov, f_lea, f_sub, f_test, f_jcc, f_jcc_backwards, f_jcc_near, f_jmp, f_call, f_call_register, f_call_memory, f_tail, f_loop, f_flags, f_ret
        counter \name
        .endr
rounds:         .quad   0
bp_count:       .quad   0
want_int3:      .quad   0
scratch:        .quad   0
constant:       .quad   0x1234
leaf_pointer:   .quad   leaf

        .balign 4096
idt:    .fill   4096, 1, 0
stack:  .fill   8192, 1, 0
stack_top:

/* The first GiB, at 0 and at BASE, in pages of 2 MiB, all of them readable, writable and executable. */
pml4:   .quad   pdpt_low - BASE + 3
        .fill   510, 8, 0
        .quad   pdpt_high - BASE + 3
pdpt_low:
        .quad   page_directory - BASE + 3
        .fill   511, 8, 0
pdpt_high:
        .fill   510, 8, 0
        .quad   page_directory - BASE + 3
        .quad   0
page_directory:
        .set    page, 0
        .rept   512
        .quad   page + 0x83
        .set    page, page + 0x200000
        .endr
end_of_image:

        /* For whoever attaches: memory that is mapped and that nobody uses. */
        .set    region, BASE + REGION
        .set    region_size, 0x200000
