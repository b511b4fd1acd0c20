"""The pool that the tests beside this one run their ranks in."""

import os
import time

import pytest
from pool import Pool, RanksFailed


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_are_processes_that_speak_with_each_other(pool, ranks):
    """Neighbours differ in their hash seeds, as those of torchrun do: an order of a set that decides anything shows."""
    total, found = pool.call(ranks, "pool_jobs:summed", 5)
    assert total == sum(5 + rank for rank in range(ranks))
    pids, hashes, local = zip(*found, strict=True)
    assert len({*pids, os.getpid()}) == ranks + 1
    assert local == tuple(map(str, range(ranks)))
    assert len(set(hashes)) == min(ranks, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_its_job_and_tells_why(pool, rank):
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match=rf"KeyError: 'what rank {rank} is missing'"):
        pool.call(2, "pool_jobs:failing", rank)
    assert time.monotonic() - begin < 60
    assert pool.call(2, "pool_jobs:summed", 5)[0] == 11, "and the next is not the worse for it"


def test_a_job_that_takes_too_long_says_where_it_is_and_is_killed_with_all_it_has_started(pool, tmp_path):
    with pytest.raises(RanksFailed, match=r"ended with -14(?s:.*)in sleeping"):
        pool.call(2, "pool_jobs:sleeping", str(tmp_path), timeout=4)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    assert len(pids) == 4
    assert wait_until_gone(pids)


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_nothing_outlives_a_pool(way, tmp_path):
    """Also where whoever had it was killed: then nobody holds the other end of the servers' pipes."""
    pool = Pool(imported=("torch.distributed",))
    pool.start(2, target=("pool_jobs:sleeping", (str(tmp_path),)))
    until = time.monotonic() + 60
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert time.monotonic() < until
        time.sleep(0.05)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    pids += [process.pid for process, _ in pool.servers]
    assert all(map(alive, pids))
    if way == "closed":
        pool.close()
    else:
        for _, connection in pool.servers:
            connection.close()
        for process, _ in pool.servers:
            process.wait(20)
    assert wait_until_gone(pids)
    pool.close()


def test_a_command_has_the_exit_code_and_the_words_of_its_ranks(pool, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print('rank', os.environ['RANK'], sys.argv[1:]); sys.exit(int(sys.argv[1]))")
    for code in (0, 3):
        done = pool.run(2, str(script), str(code))
        assert done.returncode == code
        assert done.stdout.splitlines() == [f"rank {rank} ['{code}']" for rank in range(2)]
