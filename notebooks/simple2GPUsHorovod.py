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
# # MNIST on two GPUs, with Horovod
#
# The same training as in simple2GPUsDDP, in PyTorch: the same digits, network, global batch, optimizer, order and number of
# epochs. Here Horovod averages the gradients, which does the same for TensorFlow. The same file runs at every scale:
#
#     ipython simple2GPUsHorovod.py           # in notebooks/: one process, on one GPU or on a laptop
#     hpcml run jobs/mnist_horovod.toml       # on a laptop, or inside an allocation
#     sbatch jobs/mnist_horovod.sbatch        # queued: one node, two GPUs
#     hpcml compare jobs/mnist_original.toml jobs/mnist_ddp.toml jobs/mnist_horovod.toml
#
# `scripts/setup --horovod` builds Horovod. Seen on 2 cores without a GPU: accuracy 0.928 with one process and with two,
# in less than a minute.

# %% tags=["parameters"]
data = "mnist"  # 5,000 real digits, offline; or a path to an .npz with x_train, y_train, x_test, y_test
global_batch = 256  # images a step, over all replicas together: more GPUs must not change what is learned
epochs = 5  # passes over the training images
lr = 3e-3  # AdamW's learning rate; it goes with the global batch, so it stays as the number of GPUs changes
seed = 123  # of split, weights and order: the runs start equal and see equal batches

# %% [markdown]
# ## Strategy
#
# One process for each GPU, on one node or on many. `begin` has put into the environment what Horovod looks for there:
# `HOROVOD_RANK`, `HOROVOD_SIZE` and where the processes meet. They are started by Slurm or by hpcml; Horovod's own
# `horovodrun` would need ssh between the nodes. The GPU of this process is `run.device`.
#
# `begin` comes first because threads and devices can't be changed once torch is imported.

# %%
import hpcml

run = hpcml.begin(strategy="horovod")

import horovod.torch as hvd
import torch

hvd.init()
rank, world = hvd.rank(), hvd.size()
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
sampler = torch.utils.data.DistributedSampler(train_set, num_replicas=world, rank=rank, seed=seed, drop_last=True)
train = torch.utils.data.DataLoader(
    train_set, batch_size=global_batch // world, sampler=sampler, drop_last=True, **workers
)
# Every test image counts once: a DistributedSampler would repeat some, to give each process equally many.
test_set = torch.utils.data.TensorDataset(images_first(x_test[rank::world]), torch.from_numpy(y_test[rank::world]))
test = torch.utils.data.DataLoader(test_set, batch_size=global_batch)

assert len(train) > 0, f"global_batch = {global_batch} is more than the {len(x_train)} training images"
print(f"{len(train)} steps an epoch, data {hpcml.data.fingerprint([x_train, y_train, x_test, y_test])}")

# %% [markdown]
# ## Model
#
# The same seed gives the same weights, so every run starts from the same point. Weights and AdamW start as Keras has them,
# where PyTorch's own defaults are others. Horovod's `DistributedOptimizer` averages the gradients over all processes while
# `backward` computes them, and its `step` waits for the last of them.

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

model = network.to(run.device)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # equal already, by the seed; weights from a file may not be
optimizer = torch.optim.AdamW(model.parameters(), lr, eps=1e-7, weight_decay=0.004)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

weights = [parameter.detach().cpu().numpy() for parameter in model.parameters()]
print(f"{sum(w.size for w in weights):,} weights, {hpcml.data.fingerprint(weights)}")

# %% [markdown]
# ## Training
#
# `run.epochs` and `run.steps` only count and keep times, but they end the run if the processes do not train together: their
# weights must be the same, bit for bit, after the first step and the tenth. With `keep` the training survives: asked to stop,
# all leave after the same step and save, and the run goes on from there when it is requeued or resumed.


# %%
def tally(logits, labels):
    """Return sums over some images: of the losses, of the right answers, of the images."""
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack(
        [losses, (logits.argmax(1) == labels).sum(), torch.tensor(len(labels), device=run.device)]
    ).detach()


def means(sums):
    """Return loss and accuracy over the images of all processes."""
    sums = hvd.allreduce(sums, op=hvd.Sum)
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
        loss.backward()  # Horovod begins to average each gradient as soon as it is computed
        optimizer.step()  # and waits for all of them here
        sums += tally(logits, labels)
    (loss, accuracy), (val_loss, val_accuracy) = means(sums), evaluate()
    told = {"loss": loss, "accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
    run.log(step=epoch, lr=lr, **told)
    print(f"epoch {epoch}/{epochs}: " + ", ".join(f"{name} {value:.4f}" for name, value in told.items()))

history = run.history  # of all epochs, also of those before a restart
assert history["loss"][-1] <= history["loss"][0], "the loss has not gone down"

# %% [markdown]
# ## Result
#
# Strategies may differ in speed, not in accuracy. The first epoch warms up, so it doesn't count for speed.
#
# With TensorFlow the strategy is the same and these lines change; Keras is tf-keras, which `begin` sees to. The rest is as
# in simple2GPUsSol2, with `train.shard(world, rank)` and batches of `global_batch // world`:
#
#     run = hpcml.begin(strategy="horovod")
#     import horovod.tensorflow.keras as hvd
#     import tensorflow as tf
#
#     hvd.init()
#     model.compile(optimizer=hvd.DistributedOptimizer(tf.keras.optimizers.AdamW(lr)), …)
#     first = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
#     model.fit(…, callbacks=[first, *run.callbacks(global_batch=global_batch)])

# %%
_, result = evaluate()
speeds = sorted(history["samples_per_s"][1:] or history["samples_per_s"])

assert abs(result - history["val_accuracy"][-1]) < 0.005, "evaluated on other images than in training"
print(f"accuracy {result:.3f}, {speeds[len(speeds) // 2]:,.0f} images/s, replicas in sync: {world}")
hvd.shutdown()
run.finish()
