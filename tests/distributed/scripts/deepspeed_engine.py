"""Pretrain a small GPT on bytes of Python's own source with DeepSpeed's engine.

deepspeed --num_accelerators 2 deepspeed_engine.py --deepspeed_config ZERO.json --output_dir FOLDER [--resume]

Nothing is downloaded. The loss of each step is printed as a line of JSON.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

SEED, BLOCK, WIDTH, HEADS, LAYERS = 0, 32, 40, 4, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids):
        """The mean loss of the next byte."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class SourceText(Dataset):
    """The bytes of a module of the standard library, in blocks."""

    def __init__(self, blocks=88):
        text = Path(argparse.__file__).read_bytes()[: blocks * BLOCK]
        self.blocks = torch.tensor(list(text)).view(blocks, BLOCK)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return self.blocks[index]


def warmup(step):
    return min(1.0, (step + 1) / 4)


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=9)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    return deepspeed.add_config_arguments(parser).parse_args()


def main():
    args = parse_arguments()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference on CPUs, and slow to compile
    deepspeed.init_distributed()
    torch.manual_seed(SEED)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)  # the line to change
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    engine, _, _, _ = deepspeed.initialize(args=args, model=model, optimizer=optimizer, lr_scheduler=scheduler)

    dataset = SourceText()
    sampler = DistributedSampler(dataset, shuffle=True, seed=SEED)
    loader = DataLoader(dataset, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler)

    done = 0
    if args.resume:
        path, client_state = engine.load_checkpoint(args.output_dir)
        assert path is not None, f"no checkpoint in {args.output_dir}"
        done = client_state["step"]

    step, epoch = 0, 0
    while step < args.steps:
        sampler.set_epoch(epoch)
        for batch in loader:
            step += 1
            if step <= done:
                continue
            loss = engine(batch.to(engine.device))
            engine.backward(loss)
            engine.step()

            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(json.dumps({"step": step, "loss": mean.item() / dist.get_world_size()}), flush=True)
            if step % args.save_steps == 0:
                engine.save_checkpoint(args.output_dir, client_state={"step": step})
            if step == args.steps:
                break
        epoch += 1
    engine.save_16bit_model(args.output_dir, "model.bin")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # with ZeRO 3 a gloo thread may abort the interpreter's end, whatever the optimizer


if __name__ == "__main__":
    main()
