"""`moerunner env`: what this machine and installation can run."""

from __future__ import annotations

from moerunner.cli.shell import FAILED, OK, Answer, DebugOption, JsonOption, Screen, verb


@verb
def run(json: JsonOption = False, debug: DebugOption = False) -> Answer:
    """Print versions, devices, each backend with the reason it can or cannot run, and a short trial."""
    from moerunner.env import collect

    facts = collect()
    screen = Screen(quiet=json)
    cpu, system, smoke = facts["cpu"], facts["system"], facts["smoke"]
    screen.table(["package", "version"], [[n, v or "not installed"] for n, v in facts["versions"].items()], numbers=False)
    screen.say()
    screen.say(f"system  {system['os']} {system['release']} {system['machine']}")
    screen.say(
        f"cpu     {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in torch, kernels: {cpu['kernels'] or 'none'}"
        + (f", memory of {cpu['memory_nodes']} nodes" if cpu["memory_nodes"] > 1 else "")
    )
    for gpu in facts["gpus"]:
        screen.say(f"gpu     {gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}")
        if gpu["no_hopper_kernel"]:
            screen.say(f"        many tokens go through Triton, not the Hopper kernel: {gpu['no_hopper_kernel']}")
    if not facts["gpus"]:
        screen.say(f"gpu     none (torch built for CUDA {facts['cuda']})" if facts["cuda"] else "gpu     none")
    screen.say()
    rows = [[b["name"], "yes" if b["available"] else "no", b["reason"]] for b in facts["backends"]]
    screen.table(["backend", f"on {facts['device']}", "dtypes, or why not"], rows, numbers=False)
    screen.say()
    verdict = "ok" if smoke["ok"] else "WRONG"
    screen.say(f"trial   {verdict}: a small layer, {smoke['error']:.1e} from the float64 oracle, {smoke['seconds']:.2f} s")
    return Answer(facts, OK if smoke["ok"] else FAILED)
