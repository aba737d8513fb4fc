# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MNIST on two GPUs, with torch FSDP
#
# The training of `simple2GPUsDDP`, with the model itself shared out: each process keeps only its part of the weights,
# their gradients and the optimizer's state. This is the next step up, for a model that one GPU can't hold; the one here is tiny,
# so that it runs anywhere. The same file runs at every scale:
#
#     ipython simple2GPUsFSDP.py              # in notebooks/: one process, on one GPU or on a laptop
#     hpcml run jobs/mnist_fsdp.toml          # on a laptop, or inside an allocation
#     sbatch jobs/mnist_fsdp.sbatch           # queued: one node, two GPUs
#     hpcml compare jobs/mnist_ddp.toml jobs/mnist_fsdp.toml
#
# Seen on 2 cores without a GPU: accuracy 0.928 with one process and with two, as with DistributedDataParallel.

# %% tags=["parameters"]
data = "mnist"  # 5,000 real digits, offline; or a path to an .npz with x_train, y_train, x_test, y_test
global_batch = 256  # images a step, over all replicas together: more GPUs must not change what is learned
epochs = 5  # passes over the training images
lr = 3e-3  # AdamW's learning rate; it goes with the global batch, so it stays as the number of GPUs changes
seed = 123  # of split, weights and order: the runs start equal and see equal batches

# %% [markdown]
# ## Strategy
#
# One process for each GPU, on one node or on many, as for DistributedDataParallel: the strategy is the same, `ddp`. `begin`
# has put into the environment what PyTorch looks for there: `MASTER_ADDR`, `MASTER_PORT`, `RANK`, `WORLD_SIZE` and
# `LOCAL_RANK`. The GPU of this process is `run.device`.
#
# `begin` comes first because threads and devices can't be changed once torch is imported.

# %%
import hpcml

run = hpcml.begin(strategy="ddp")

import torch
import torch.distributed as dist

dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it, which is TensorFlow's default
print(f"replicas in sync: {world}")

# %% [markdown]
# ## Data
#
# Every run sees the same batches in the same order. Each process takes its part of every global batch: the sampler deals
# out one shuffled order like cards, so that together the parts are the same batch for any number of processes.

# %%
(x_train, y_train), (x_test, y_test) = hpcml.data.load(data, seed)  # x (n, 28, 28, 1) in 0…1, y (n,)


def images_first(x):
    """PyTorch wants the channels before height and width: (n, 1, 28, 28)."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


# What `hpcml tune` searches over, with the values that hold while the job has no [tuning]: processes that only make batches
# ready, and how many batches each is ahead. 0 is best here, where the images lie in memory already.
tuned = run.tuned(data_threads=0, prefetch=2)
workers = {"num_workers": tuned["data_threads"]}
if tuned["data_threads"]:
    workers |= {"prefetch_factor": tuned["prefetch"], "persistent_workers": True}

# A remainder would be a smaller batch, with noisier gradients; other images are left out each time.
train_set = torch.utils.data.TensorDataset(images_first(x_train), torch.from_numpy(y_train))
sampler = torch.utils.data.DistributedSampler(train_set, seed=seed, drop_last=True)
train = torch.utils.data.DataLoader(
    train_set, batch_size=global_batch // world, sampler=sampler, drop_last=True, **workers
)
# Every test image counts once. Each process takes its part of every batch, so that all have equally many batches: see
# "What is different".
x, y = images_first(x_test), torch.from_numpy(y_test)
test = [
    (x[first + rank : first + global_batch : world], y[first + rank : first + global_batch : world])
    for first in range(0, len(x), global_batch)
]

assert len(train) > 0, f"global_batch = {global_batch} is more than the {len(x_train)} training images"
print(f"{len(train)} steps an epoch, data {hpcml.data.fingerprint([x_train, y_train, x_test, y_test])}")

# %% [markdown]
# ## Model
#
# The same seed gives the same weights, so every run starts from the same point, the one of `simple2GPUsDDP`: the
# fingerprint printed here is the same.

# %%
torch.manual_seed(seed)
network = torch.nn.Sequential(
    # in: 1, 28, 28
    torch.nn.Conv2d(1, 32, 5),  # 32, 24, 24
    torch.nn.MaxPool2d(2),  # 32, 12, 12
    torch.nn.LeakyReLU(0.3),  # after pooling: the same values as before it, for a quarter of the work
    torch.nn.Conv2d(32, 4, 5),  # 4, 8, 8
    torch.nn.Flatten(),  # 256
    torch.nn.LeakyReLU(0.3),
    torch.nn.Linear(256, 10),  # logits
)
for layer in network:
    if hasattr(layer, "weight"):
        torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.zeros_(layer.bias)

weights = [parameter.detach().numpy() for parameter in network.parameters()]
print(f"{sum(w.size for w in weights):,} weights, {hpcml.data.fingerprint(weights)}")

# %% [markdown]
# ## What is different
#
# `fully_shard` cuts each weight into as many parts as there are processes, and each process keeps one. Before a layer is
# computed its parts are gathered, and afterwards dropped again; in `backward` too, where the gradients are then summed so
# that each process gets its part of them. The optimizer comes after it, because it must hold the parts.
#
# - **Memory**: in float32 AdamW needs 16 bytes a weight: the weight, its gradient, two moments. With
#   DistributedDataParallel every GPU holds all of that, with FSDP a share, beside the one layer that is gathered.
#   Activations are not shared.
# - **Time**: about 1.5 × the data sent by DistributedDataParallel (Rajbhandari et al., ZeRO, 2020, section 7).
# - **When it pays**: a model with 7 billion weights has 112 GB of state, which an A100 of 80 GB can't hold; of two each
#   holds 56 GB. A model that fits is faster with DistributedDataParallel.
# - **Every process must call the model equally often**, evaluation included: each call gathers from all.
# - **What reads whole weights must ask for them**, on all processes: `parameter.full_tensor()`. For checkpoints there is
#   `torch.distributed.checkpoint`, which saves the parts and can deal them out to another number of processes. `run.epochs`
#   uses it for what `keep` names.

# %%
from torch.distributed.fsdp import fully_shard

network.to(run.device)
mesh = dist.init_device_mesh(run.device.type, (world,))  # all processes in one row
for layer in network:
    if hasattr(layer, "weight"):  # layer by layer: never more than one is whole
        fully_shard(layer, mesh=mesh)
model = fully_shard(network, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr, eps=1e-7, weight_decay=0.004)

weights = [parameter.full_tensor().detach().cpu().numpy() for parameter in model.parameters()]
parts = [tuple(parameter.to_local().shape) for parameter in model.parameters()]
print(f"put together again: {hpcml.data.fingerprint(weights)}; the parts of rank {rank}: {parts}")

# %% [markdown]
# ## Training
#
# `run.epochs` and `run.steps` only count and keep times, but they end the run if the processes do not train together:
# every weight must be cut into parts that lie on all of them, or be the same, bit for bit, after the first step and the
# tenth. With `keep` the training survives: asked to stop, all leave after the same step and save, and the run goes on from
# there when it is requeued or resumed.


# %%
def tally(logits, labels):
    """Return sums over some images: of the losses, of the right answers, of the images."""
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack(
        [losses, (logits.argmax(1) == labels).sum(), torch.tensor(len(labels), device=run.device)]
    ).detach()


def means(sums):
    """Return loss and accuracy over the images of all processes."""
    dist.all_reduce(sums)
    return (sums[:2] / sums[2]).tolist()


def evaluate():
    model.eval()
    sums = torch.zeros(3, device=run.device)
    with torch.no_grad():
        for images, labels in test:
            images, labels = images.to(run.device), labels.to(run.device)
            sums += tally(model(images), labels)
    return means(sums)


for epoch in run.epochs(epochs, model, global_batch=global_batch, keep=[optimizer]):
    sampler.set_epoch(epoch)  # another order in each epoch, the same in every process
    model.train()
    sums = torch.zeros(3, device=run.device)
    for images, labels in run.steps(train):
        images, labels = images.to(run.device), labels.to(run.device)
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # the gradients are averaged here, and each process gets its part of them
        optimizer.step()
        sums += tally(logits, labels)
    (loss, accuracy), (val_loss, val_accuracy) = means(sums), evaluate()
    told = {"loss": loss, "accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
    run.log(step=epoch, lr=lr, **told)
    print(f"epoch {epoch}/{epochs}: " + ", ".join(f"{name} {value:.4f}" for name, value in told.items()))


def held():
    """Return the bytes of weights, gradients and moments: for each process what it holds, and for the whole model."""
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    tensors = [t for t in tensors if hasattr(t, "to_local")]  # not the count of steps, which is no part of anything
    mine = torch.zeros(world, dtype=torch.int64, device=run.device)
    mine[rank] = sum(tensor.to_local().nbytes for tensor in tensors)
    dist.all_reduce(mine)
    return mine.tolist(), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


parts, whole = held()
print(f"weights, gradients and AdamW's moments: {whole:,} bytes, held by rank: " + ", ".join(f"{n:,}" for n in parts))
if run.device.type == "cuda":
    print(f"most on this GPU at any time, activations included: {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")

assert sum(parts) == whole, "the parts are not one model"
history = run.history  # by name, of all epochs
assert history["loss"][-1] <= history["loss"][0], "the loss has not gone down"

# %% [markdown]
# ## Result
#
# Strategies may differ in speed, not in accuracy. The first epoch warms up, so it doesn't count for speed.

# %%
_, result = evaluate()
speeds = sorted(history["samples_per_s"][1:] or history["samples_per_s"])

assert abs(result - history["val_accuracy"][-1]) < 0.005, "evaluated on other images than in training"
print(f"accuracy {result:.3f}, {speeds[len(speeds) // 2]:,.0f} images/s, replicas in sync: {world}")
dist.destroy_process_group()
run.finish()
