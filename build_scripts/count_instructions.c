/* A plugin of QEMU 7 and 8 that counts the instructions of an aarch64 program.
 *
 * When the program calls getpriority, the plugin writes a line to standard output: COUNT, all instructions so far, and of
 * these the int8 products (dot products and matrix products, NEON and SVE) and the float multiply-adds (NEON, SVE and SME).
 * The encodings are those of the Arm Architecture Reference Manual, section C4.1.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Debian's packages have no qemu-plugin.h: these are its declarations in version 1 of the interface. */
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*on_translation)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*on_block)(unsigned, void *);
typedef void (*on_syscall)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, on_translation);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, on_block, int flags, void *);
extern void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, on_syscall);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
#define PUBLIC __attribute__((visibility("default")))
PUBLIC int qemu_plugin_version = 1;

enum { GETPRIORITY = 141 };
enum kind { ANY, INT8, FLOAT, KINDS };
struct block {
  uint32_t of[KINDS];
};
static uint64_t total[KINDS];

static const struct {
  uint32_t mask, bits;
  enum kind kind;
} encodings[] = {
    {0x9f20fc00, 0x0e009400, INT8},  /* SDOT, UDOT */
    {0x9f00f400, 0x0f00e000, INT8},  /* SDOT, UDOT by element */
    {0xdf20fc00, 0x4e00a400, INT8},  /* SMMLA, UMMLA */
    {0xffe0fc00, 0x4e80ac00, INT8},  /* USMMLA */
    {0xff20f800, 0x44000000, INT8},  /* SVE: SDOT, UDOT */
    {0xff20f800, 0x44200000, INT8},  /* SVE: SDOT, UDOT by element */
    {0xff20fc00, 0x45009800, INT8},  /* SVE: SMMLA, UMMLA, USMMLA */
    {0xbfa0fc00, 0x0e20cc00, FLOAT}, /* FMLA */
    {0xbf80f400, 0x0f801000, FLOAT}, /* FMLA by element */
    {0xff20e000, 0x65200000, FLOAT}, /* SVE: FMLA */
    {0xff20fc00, 0x64200000, FLOAT}, /* SVE: FMLA by element */
    {0xff000000, 0x80000000, FLOAT}, /* SME: FMOPA */
};

static void count(unsigned cpu, void *data) {
  const struct block *block = data;
  (void)cpu;
  for (int kind = 0; kind < KINDS; kind++)
    if (block->of[kind]) __atomic_fetch_add(&total[kind], block->of[kind], __ATOMIC_RELAXED);
}

static void look(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  struct block *block = calloc(1, sizeof *block);
  (void)id;
  if (block == NULL) abort();
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
    uint32_t code;
    memcpy(&code, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof code);
    block->of[ANY]++;
    for (size_t row = 0; row < sizeof encodings / sizeof *encodings; row++)
      if ((code & encodings[row].mask) == encodings[row].bits) {
        block->of[encodings[row].kind]++;
        break;
      }
  }
  qemu_plugin_register_vcpu_tb_exec_cb(tb, count, 0, block);
}

static void report(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                   uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)cpu, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != GETPRIORITY) return;
  char line[128];
  int length = snprintf(line, sizeof line, "COUNT %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", total[ANY], total[INT8], total[FLOAT]);
  if (write(STDOUT_FILENO, line, (size_t)length) != length) abort();
}

PUBLIC int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, look);
  qemu_plugin_register_vcpu_syscall_cb(id, report);
  return 0;
}
