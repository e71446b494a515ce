#!/bin/bash
# Two torchrun agents on two hosts, which are two network namespaces of this machine with a cable between them:
#
#     sudo scripts/two_nodes.sh
#
# Needs root, iproute2 and util-linux. A tiny PRFL run on the two hosts must equal one process. When the cable is
# cut, both processes must end, each with a line that names the other host. When it is back, the run is started
# once more, and must end equal to the bit to one that nothing has disturbed. PYTHON is the python of the
# environment (default: .venv/bin/python). docs/cluster.md has a result.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
TIMEOUT=20 # seconds: parallel.timeout
WORK=$(mktemp -d)
NODES="node-a node-b"

remove() {
    cable up || true # an agent that waits for the other host hears no signal
    kill $(jobs -p) 2>/dev/null || true
    wait || true
    for node in $NODES; do
        ip netns del "$node" 2>/dev/null || true
        rm -rf "/etc/netns/$node"
    done
    rm -rf "$WORK"
}
trap remove EXIT

for node in $NODES; do
    ip netns add "$node"
    ip -n "$node" link set lo up
    mkdir -p "/etc/netns/$node"
    printf '127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n' > "/etc/netns/$node/hosts"
done
ip -n node-a link add cable type veth peer name cable netns node-b
ip -n node-a addr add 10.77.0.1/24 dev cable
ip -n node-b addr add 10.77.0.2/24 dev cable

cable() {
    for node in $NODES; do ip -n "$node" link set cable "$1"; done
}

# host NODE ADDRESS ID OUT: the agent of one host and its process, in the background.
host() {
    OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=cable ip netns exec "$1" unshare --uts \
        sh -c 'hostname "$0"; exec "$@"' "$1" "$PYTHON" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 \
        --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29400 --rdzv-id="$3" --local-addr="$2" \
        -m prfl_engine.cli train "$WORK/config.yaml" "train.out=$WORK/$4" train.resume=auto \
        "parallel.timeout=$TIMEOUT" > "$WORK/$3.$1.log" 2>&1 &
}

# both ID OUT: the processes of both, whose ids are in A and B.
both() {
    host node-a 10.77.0.1 "$1" "$2"; A=$!
    host node-b 10.77.0.2 "$1" "$2"; B=$!
}

fail() {
    echo "two_nodes.sh: $1"
    tail -n 40 "$WORK"/*.log
    exit 1
}

# compare A B METHOD: two runs, equal to the bit or as far as sums in another order allow.
compare() {
    "$PYTHON" - "$WORK/$1" "$WORK/$2" "$3" <<'END'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from training_runs import assert_equal, content, values

one, two = map(Path, sys.argv[1:3])
a, b = values(one), values(two)
if sys.argv[3] == "bit":
    assert a == b, (a, b)
    assert_equal(content(one / "checkpoint-8"), content(two / "checkpoint-8"))
assert a.keys() == b.keys()
for step in a:
    for name, x in a[step].items():
        assert abs(b[step][name] - x) <= 1e-5 + 2e-3 * abs(x), (step, name, x, b[step][name])
END
}

"$PYTHON" - "$WORK" <<'END'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from helpers import write_run

train = {"accumulate": 2, "steps": 8, "save_every": 2, "keep": 9}
write_run(Path(sys.argv[1]), samples=8, train=train)
END

cable up
OMP_NUM_THREADS=1 "$PYTHON" -m prfl_engine.cli train "$WORK/config.yaml" "train.out=$WORK/one" > "$WORK/one.log" 2>&1
both whole two
wait $A && wait $B || fail "the run on two hosts failed"
compare one two rounding || fail "two hosts differ from one process"
echo "two hosts train as one process does"

both cut parts
until [ -d "$WORK/parts/checkpoint-4" ]; do
    kill -0 $A 2>/dev/null || fail "the run ended before the cable was cut"
    sleep 0.1
done
cable down
begin=$(date +%s)
for pair in "node-a node-b" "node-b node-a"; do
    read -r here there <<< "$pair"
    until grep "^prfl: .*rank [01] on $there" "$WORK/cut.$here.log"; do
        [ $(($(date +%s) - begin)) -lt $((5 * TIMEOUT)) ] || fail "$here does not name $there"
        sleep 0.5
    done
done
echo "cable cut after checkpoint-4: both processes ended within $(($(date +%s) - begin)) s (time-out $TIMEOUT s)"

cable up # torchrun on node-b, whose rendezvous is on node-a, waits for this
wait $A && fail "node-a ended as if all were well"
wait $B && fail "node-b ended as if all were well"
last=$(cd "$WORK/parts" && ls -d checkpoint-* | tail -n 1)
both again parts
wait $A && wait $B || fail "the run did not go on"
compare two parts bit || fail "the resumed run differs"
echo "cable back: the run went on from $last and is equal to the bit"
