#!/usr/bin/env bash
# Measures on one CUDA GPU what of weeks 6, 7, 10 and 12 a CPU cannot show, within eight minutes.
#
#     benchmarks/gpu.sh                          # every step, into runs/gpu
#     benchmarks/gpu.sh runs/gpu decode engine   # these steps only
#     benchmarks/gpu.sh --smoke runs/smoke       # tiny, on a CPU: shows that it runs, and measures nothing
#
# Each step writes STEP.log, and the weeks' logs under STEP/, in the folder; checkpoints are not kept. A line for
# each says how it went; at the end stands what this device does not have or a tiny run leaves out, and which
# steps failed. The exit status is 1 where a step failed, 2 where nothing could be started.
#
# In the environment: DATA, the text (tinyshakespeare); PYTHON, an interpreter with the course's packages; LIMIT,
# seconds for everything (480). A step that finds no time left has failed.
set -u

STEPS="table gpt2 loss training decode fsdp alignment engine server"
TOGETHER="fsdp alignment engine server" # their times are not looked at: they run side by side, at the end

# week 7's table: GPT-2's blocks in every number format, then its ladder
step_table() {
    week 07_amp --preset "$PRESET" --seeds 1 --formats fp32 tf32 bf16 fp16 fp8
    logged --topic 07_amp --metrics speedup tokens_per_second fp32_ms tf32_ms bf16_ms fp16_ms fp8_ms
}

# GPT-2 124M, 32 x 1,024 tokens a step, compiled, in bf16 and in fp8: tokens/s and MFU
step_gpt2() {
    measure gpt2
}

# week 7's losses: in chunks, and by its Triton kernel (on a CPU in Triton's interpreter)
step_loss() {
    week 07_amp --preset "$PRESET" --study loss $LOSS_SIZE
    measure cross-entropy
}

# GPT-2's blocks trained for 300 steps on the text, in bf16 and compiled
step_training() {
    week 06_gpt2 --preset "$PRESET" $TRAINING_SIZE
    logged --topic 06_gpt2 --metrics val_loss bits_per_byte first_loss tokens_per_second train_seconds
}

# generate, steps of static shapes, the same as a CUDA graph, and compiled
step_decode() {
    measure decode
}

# FSDP2 on one rank beside the same training without it
step_fsdp() {
    week 06_gpt2 --preset smoke --run-name alone
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 \
        weeks/06_gpt2/run.py --device "$DEVICE" --data "$DATA" --preset smoke --run-name fsdp --parallel fsdp
    logged --topic 06_gpt2 --alike alone fsdp
}

# GRPO and its controls; then week 6's model by a reward model, PPO, GRPO and DPO
step_alignment() {
    week 10_ppo_dpo --preset smoke
    logged --topic 10_ppo_dpo --metrics base_pass_at_1 grpo_pass_at_1
    week 10_ppo_dpo --preset smoke --study exclaim
}

# texts that the engine writes side by side: those of generate?
step_engine() {
    measure engine
}

# the server in a process of its own, asked by HTTP
step_server() {
    week 12_deploy --preset smoke
    logged --topic 12_deploy --metrics same_alone programs_alike
}

week() { "$PYTHON" "weeks/$1/run.py" --device "$DEVICE" --data "$DATA" "${@:2}"; }
measure() { "$PYTHON" benchmarks/gpu.py --measure "$1" --device "$DEVICE" $SMOKE; }
logged() { "$PYTHON" benchmarks/gpu_logs.py "$@"; }

# Runs a step with what is left of the time, and keeps its output, its status and its seconds.
run_step() {
    local started=$SECONDS left=$((LIMIT - SECONDS)) status=124
    echo "no time left" > "$FOLDER/$1.log"
    if [ "$left" -gt 0 ]; then
        LLM_WEEKS_OUTPUT="$FOLDER/$1" timeout --kill-after=10 "$left" bash -e -c "step_$1" \
            > "$FOLDER/$1.log" 2>&1 < /dev/null
        status=$?
    fi
    echo "$status $((SECONDS - started))" > "$FOLDER/$1.status"
    rm -rf "$FOLDER/$1/checkpoints" # GPT-2's take 2 GB
}

# Prints a step's line, and notes it where it failed.
report() {
    local status seconds line outcome=ok
    read -r status seconds < "$FOLDER/$1.status"
    line=$(sed -n 's/^summary: //p' "$FOLDER/$1.log" | paste -sd'|' | sed 's/|/ | /g')
    if [ "$status" -ne 0 ]; then
        FAILED="$FAILED $1"
        outcome=FAILED
        line="$line [$(grep -v '^ *$' "$FOLDER/$1.log" | tail -n 1)]"
        case "$status" in 124 | 137) line="$line [stopped: $LIMIT s for everything are over]" ;; esac
    fi
    printf '%-10s %-6s %4s s  %s\n' "$1" "$outcome" "$seconds" "$line"
}

fail() {
    echo "error: $1" >&2
    exit 2
}

SMOKE=""
DEVICE=cuda
PRESET=gpu
LOSS_SIZE="--loss-tokens 32768 --loss-widths 768 --chunk-sizes 1024 4096"
TRAINING_SIZE="--train.steps 300 --train.grad-accum-steps 1 --train.warmup-steps 30 --train.eval-every 100
    --train.eval-windows 32 --train.checkpoint-every 300 --sample-tokens 100"
if [ "${1:-}" = --smoke ]; then
    SMOKE=--smoke DEVICE=cpu PRESET=smoke LOSS_SIZE="" TRAINING_SIZE=""
    export TRITON_INTERPRET=1
    shift
fi
case "${1:-}" in -*) fail "no option is called $1; there is: --smoke" ;; esac
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
FOLDER=${1:-$ROOT/runs/gpu}
[ $# -gt 0 ] && shift
CHOSEN=${*:-$STEPS}
for step in $CHOSEN; do
    case " $STEPS " in *" $step "*) ;; *) fail "no step is called $step; there are: $STEPS" ;; esac
done

mkdir -p "$FOLDER" || exit 2
FOLDER=$(cd "$FOLDER" && pwd) || exit 2
cd "$ROOT" || exit 2
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
DATA=${DATA:-tinyshakespeare}
LIMIT=${LIMIT:-480}
export SMOKE DEVICE PRESET LOSS_SIZE TRAINING_SIZE FOLDER PYTHON DATA
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export -f week measure logged
for step in $STEPS; do export -f "step_$step"; done

"$PYTHON" - "$DEVICE" << 'END' || fail "nothing can be measured here: give another PYTHON, or --smoke"
import sys

import torch

from shared.devices import device_name, resolve_device

try:
    device = resolve_device(sys.argv[1])
except ValueError as error:
    sys.exit(str(error))
print(f"{device_name(device)}; torch {torch.__version__}")
END

FAILED=""
for step in $CHOSEN; do
    case " $TOGETHER " in *" $step "*) continue ;; esac
    run_step "$step"
    report "$step"
done
for step in $CHOSEN; do
    case " $TOGETHER " in *" $step "*) run_step "$step" & ;; esac
done
wait
for step in $CHOSEN; do
    case " $TOGETHER " in *" $step "*) report "$step" ;; esac
done

for step in $CHOSEN; do
    sed -n -E "s/^(not on this device|left out at smoke size): /&$step: /p" "$FOLDER/$step.log"
done
echo "$SECONDS s; logs in $FOLDER"
if [ -n "$FAILED" ]; then
    echo "failed:$FAILED"
    exit 1
fi
