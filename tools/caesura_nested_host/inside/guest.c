/* The smallest guest that can prove something: multiboot, 32 bit, no operating system.
   Beats by the timer's interrupts on its second serial line: "beat SEQUENCE SECONDS BOOT", where BOOT is made once from the
   processor's counter. The main loop compares a pattern in 8 MiB of RAM: "memory ROUND bad=WORDS". A round has one word of
   STRIDE, so some of every page, and STRIDE rounds have all: comparing all the time would be most of what the emulator does. */
typedef unsigned u32;
typedef unsigned char u8;
enum { COM2 = 0x2f8, HZ = 20, BEAT = 4, // few interrupts: it is emulated twice
        MEMORY = 0x1000000, WORDS = (8 << 20) / 4, STRIDE = 16 };

__asm__(".section .mb,\"a\"\n.align 4\n.long 0x1BADB002,0,-0x1BADB002\n"
        ".text\n.globl _start\n_start: mov $stack+16384,%esp\n cld\n call main\n1: hlt\n jmp 1b\n"
        ".globl on_timer\non_timer: pusha\n cld\n call tick\n movb $0x20,%al\n outb %al,$0x20\n popa\n iret\n"
        ".bss\n.globl stack\n.align 16\nstack: .space 16384\n.text\n");

static inline void out(u32 port, u8 value) { __asm__ volatile("outb %0,%w1" ::"a"(value), "Nd"(port)); }
static inline u8 in(u32 port) { u8 value; __asm__ volatile("inb %w1,%0" : "=a"(value) : "Nd"(port)); return value; }
static void character(char c) { while (!(in(COM2 + 5) & 0x20)); out(COM2, c); }
static void text(const char *s) { while (*s) character(*s++); }
static void number(u32 n) { char digits[12]; int i = 0; do { digits[i++] = '0' + n % 10; n /= 10; } while (n); while (i) character(digits[--i]); }
static void hex(u32 n) { for (int i = 28; i >= 0; i -= 4) character("0123456789abcdef"[n >> i & 15]); }
static u32 word(u32 seed, u32 place) { u32 x = (place + seed) * 2654435761u; return x ^ x >> 15; }

static volatile u32 ticks, sequence;
static u32 boot;
static struct { unsigned short low, selector; u8 zero, flags; unsigned short high; } __attribute__((packed)) gates[64];
extern void on_timer(void);

void tick(void) {
  if (++ticks % BEAT) return;
  text("beat "); number(++sequence); character(' '); number(ticks / HZ); character('.'); number(ticks * 10 / HZ % 10);
  character(' '); hex(boot); character('\n');
}

void main(void) {
  out(COM2 + 1, 0); out(COM2 + 3, 0x80); out(COM2, 1); out(COM2 + 1, 0); out(COM2 + 3, 3); out(COM2 + 2, 7);
  u32 low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
  boot = (low ^ high * 2654435761u) | 1;
  u32 *memory = (u32 *)MEMORY;
  for (u32 i = 0; i < WORDS; i++) memory[i] = word(boot, i);

  unsigned short selector;
  __asm__ volatile("mov %%cs,%0" : "=r"(selector));
  u32 handler = (u32)on_timer;
  gates[32].low = handler; gates[32].high = handler >> 16; gates[32].selector = selector; gates[32].flags = 0x8e;
  struct { unsigned short limit; void *base; } __attribute__((packed)) table = {sizeof gates - 1, gates};
  __asm__ volatile("lidt %0" ::"m"(table));
  out(0x20, 0x11); out(0xa0, 0x11); out(0x21, 32); out(0xa1, 40); out(0x21, 4); out(0xa1, 2); out(0x21, 1); out(0xa1, 1);
  out(0x21, 0xfe); out(0xa1, 0xff);
  u32 divisor = 1193182 / HZ;
  out(0x43, 0x34); out(0x40, divisor); out(0x40, divisor >> 8);
  __asm__ volatile("sti");
  for (u32 round = 1;; round++) {
    u32 bad = 0;
    for (u32 i = round % STRIDE; i < WORDS; i += STRIDE) if (memory[i] != word(boot, i)) bad++;
    __asm__ volatile("cli");
    text("memory "); number(round); text(" bad="); number(bad); character('\n');
    __asm__ volatile("sti");
    u32 since = ticks;
    while (ticks - since < 2 * HZ) __asm__ volatile("hlt");
  }
}
