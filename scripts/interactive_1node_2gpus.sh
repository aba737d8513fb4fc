#!/usr/bin/env bash
# interactive_1node_2gpus.sh: a shell on one compute node with two A100s.
#
#   ./interactive_1node_2gpus.sh [OPTION...] [-- COMMAND ARG...]
#
# Asks Slurm for one node and one task, waits in the queue (Ctrl-C cancels), then opens bash
# there, or runs COMMAND. A flag wins over its variable, the variable over the default:
#
#   -t, --time TIME         HPCML_TIME         00:59:00   [days-]hours:minutes:seconds
#       --mem SIZE          HPCML_MEM          16G        on the node; K, M, G or T; 0: all of it
#   -c, --cores N           HPCML_CORES        64         also --cpus-per-task
#   -G, --gpus N            HPCML_GPUS         2          short for --gres gpu:N
#       --gres GRES         HPCML_GRES         gpu:2      with a type where a site wants one: gpu:a100:2
#   -p, --partition NAME    HPCML_PARTITION    -          "-": left to the cluster
#   -q, --qos NAME          HPCML_QOS          -
#   -A, --account NAME      HPCML_ACCOUNT      -
#   -C, --constraint LIST   HPCML_CONSTRAINT   -
#       --reservation NAME  HPCML_RESERVATION  -
#   -J, --job-name NAME     HPCML_JOB_NAME     -
#       --dry-run           print the command, ready to paste, and run nothing
#   -h, --help              print this
#
# On the node HPCML_PROJECT is this project's directory (runs land there) and its .venv is active,
# so that ipython and jupyter work as typed. A virtual environment that is active already stays;
# HPCML_ACTIVATE=0 activates none. HPCML_MODULES="cesga/system miniconda3/22.11" loads modules
# first. Job steps in the shell need `srun --overlap`: the shell itself holds cores and GPUs.
#
# A shell needs a terminal. COMMAND does not: without one it gets plain input and output.
# Exit status: that of the shell or COMMAND; 2 wrong usage, no srun, or already inside a job.
set -euo pipefail

script=$(readlink -f "${BASH_SOURCE[0]}")
project=$(dirname "$(dirname "$script")")
export HPCML_PROJECT=${HPCML_PROJECT:-$project}

say() { printf '%s\n' "${@/#/interactive_1node_2gpus.sh: }" >&2; }
refuse() { say "$@" && exit 2; }
usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$script"; }

# ------------------------------------------------------ what is asked: flag, variable, default
keys=(time mem cores gpus gres partition qos account constraint reservation job_name)
declare -A default=([time]=00:59:00 [mem]=16G [cores]=64 [gres]=gpu:2) value=() origin=()
declare -A flag=(
  [-t]=time [--time]=time [--mem]=mem [-c]=cores [--cores]=cores [--cpus-per-task]=cores
  [-G]=gpus [--gpus]=gpus [--gres]=gres [-p]=partition [--partition]=partition
  [-q]=qos [--qos]=qos [-A]=account [--account]=account [-C]=constraint [--constraint]=constraint
  [--reservation]=reservation [-J]=job_name [--job-name]=job_name
)
problems=()
dry_run=
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --) shift && break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; # --time=1:00:00 is --time 1:00:00
    -[!-]?*) set -- "${1:0:2}" "${1:2}" "${@:2}" ;; # -c32 is -c 32
    -*) ;;
    *) problems+=("\"$1\": a command for the node goes after --") && shift && continue ;;
  esac
  key=${flag[$1]-}
  if [[ -z $key ]]; then
    problems+=("$1: no such option; --help lists them")
    if [[ ${2--} != -* ]]; then shift; fi # its value, not another mistake
  elif [[ -z ${2-} || $2 == -* ]]; then
    problems+=("$1: needs a value")
    if (($# > 1)) && [[ -z $2 ]]; then shift; fi
  else
    value[$key]=$2 origin[$key]=$1
    shift
  fi
  shift
done # what is left in "$@" is COMMAND

gpus_from=${origin[gpus]-}${origin[gres]-} # two names of one thing: either flag silences both variables
for key in "${keys[@]}"; do
  variable=HPCML_${key^^}
  if [[ -n ${value[$key]-} || -z ${!variable-} ]]; then continue; fi
  if [[ $key == gpus || $key == gres ]] && [[ -n $gpus_from ]]; then continue; fi
  value[$key]=${!variable} origin[$key]=$variable
done

must() { # must KEY PATTERN RULE: a value that is given matches
  [[ -z ${value[$1]-} || ${value[$1]} =~ $2 ]] || problems+=("${origin[$1]}: \"${value[$1]}\" $3")
}
item='[A-Za-z][A-Za-z0-9_.-]*(:[A-Za-z][A-Za-z0-9_.-]*)?(:[1-9][0-9]*)?'
must time '^([0-9]+-[0-9]+(:[0-9]+){0,2}|[0-9]+(:[0-9]+){0,2})$' \
  "is no Slurm time; write [days-]hours:minutes:seconds, as in 00:59:00"
must mem '^(0|[1-9][0-9]*[KMGTkmgt])$' "is no memory size; write 16G (K, M, G or T), or 0 for all of the node's"
must cores '^[1-9][0-9]*$' "is no number of cores; write a whole number from 1, as in 64"
must gpus '^[1-9][0-9]*$' "is no number of GPUs; write a whole number from 1, as in 2"
must gres "^$item(,$item)*\$" "is no GPU request; write gpu:2, or with a type gpu:a100:2"
for key in partition qos account constraint reservation; do
  must "$key" '^[^[:space:]]+$' "is no $key; it holds no spaces"
done
must job_name '^[^[:cntrl:]]+$' "is no job name; it is one line of text"
if [[ -n ${value[gpus]-} && -n ${value[gres]-} ]]; then
  problems+=("${origin[gpus]} and ${origin[gres]}: both ask for GPUs; give one of them")
fi
if ((${#problems[@]})); then refuse "${problems[@]}"; fi

# ------------------------------------------------------------------------------- the command
for key in time mem cores; do value[$key]=${value[$key]:-${default[$key]}}; done
gres=${value[gres]:-${value[gpus]:+gpu:${value[gpus]}}}
gres=${gres:-${default[gres]}}
options=(-N 1 --ntasks=1) # one node, one task, whatever SLURM_NTASKS says
for key in job_name partition qos account constraint reservation; do
  if [[ -n ${value[$key]-} ]]; then options+=("--${key//_/-}=${value[$key]}"); fi
done
options+=("--gres=$gres" "--time=${value[time]}" "--mem=${value[mem]}" -c "${value[cores]}")
want_shell=$((!$#))
if ((want_shell)) || [[ -n $dry_run || (-t 0 && -t 1) ]]; then options+=(--pty); fi

# ~/.bashrc may put another Python first (conda init does): on_node.bash comes after it, on the node.
on_node=$project/scripts/lib/on_node.bash
venv=${VIRTUAL_ENV:-$HPCML_PROJECT/.venv}
if [[ -n ${HPCML_MODULES-} || (${HPCML_ACTIVATE-} != 0 && -f $venv/bin/activate) ]]; then
  if ((want_shell)); then set -- bash --rcfile "$on_node"; else set -- bash "$on_node" "$@"; fi
elif ((want_shell)); then
  set -- bash
fi

if [[ -n $dry_run ]]; then
  printf -v line '%q ' srun "${options[@]}" "$@"
  printf '%s\n' "${line% }"
  exit
fi
if [[ -n ${SLURM_JOB_ID-} ]]; then
  refuse "you are already in job $SLURM_JOB_ID: work here, or leave it with \`exit\` before asking for another" \
    "a shell of salloc reaches its node with: srun --jobid=$SLURM_JOB_ID --overlap --pty bash"
fi
if ! command -v srun >/dev/null; then
  refuse "srun is not on PATH: log in to the cluster and start this there" \
    "or practise on this machine: scripts/devcluster up, then scripts/devcluster shell"
fi
if ((want_shell)) && [[ ! -t 0 ]]; then
  refuse "a shell needs a terminal, and standard input is none: give a command after --, or submit a job with sbatch"
fi

# Left over from an earlier job these would shape this one (SLURM_CPU_BIND, SLURM_MEM_PER_CPU, ...:
# "INPUT ENVIRONMENT VARIABLES" of https://slurm.schedmd.com/srun.html). Who and where you are stays.
for variable in "${!SLURM_@}"; do
  case ${variable#SLURM_} in
    CONF | CLUSTERS | JWT | ACCOUNT | PARTITION | QOS | CONSTRAINT | RESERVATION | DEBUG) ;;
    *) unset "$variable" ;;
  esac
done
say "asking for 1 node: $gres, ${value[cores]} cores, ${value[mem]} memory, for ${value[time]}; waits in the queue, Ctrl-C cancels"
exec srun "${options[@]}" "$@"
