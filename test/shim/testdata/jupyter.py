"""What Jupyter does with a kernel: start, run, interrupt, restart, kill, shut down."""
import sys
import time

from jupyter_client.manager import KernelManager

km = KernelManager(kernel_name="box")
km.start_kernel(cwd=sys.argv[1])
kc = km.blocking_client()
kc.start_channels()
kc.wait_for_ready(timeout=90)


def run(code):
    said = []
    reply = kc.execute_interactive(code, timeout=60, output_hook=lambda m: said.append(m["content"].get("text", "")))
    if reply["content"]["status"] != "ok":
        return reply["content"].get("ename", reply["content"]["status"])
    return "".join(said).strip()


print(run("print(6 * 7)"))
print(run("import os; print(os.getuid(), os.getcwd(), os.path.exists('/etc/shadow'))"))

loop = kc.execute("import time\nprint('in', flush=True)\nwhile True: time.sleep(0.05)")
while True:
    m = kc.get_iopub_msg(timeout=60)
    if m["parent_header"].get("msg_id") == loop and m["content"].get("text") == "in\n":
        break
km.interrupt_kernel()
while True:
    m = kc.get_shell_msg(timeout=60)
    if m["parent_header"].get("msg_id") == loop:
        print(m["content"]["ename"])
        break
deadline = time.time() + 60
while run("x = 1") != "" and time.time() < deadline:  # what follows an error at once is aborted
    time.sleep(0.1)
print(run("print('lives' if x else '')"))

for now in False, True:
    km.restart_kernel(now=now)
    kc.wait_for_ready(timeout=90)
    print(run("print('remembers' if 'x' in dir() else 'forgot')"))

kc.stop_channels()
km.shutdown_kernel()
print("ended" if not km.is_alive() else "lives on")
