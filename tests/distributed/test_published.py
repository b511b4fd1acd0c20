"""A checkpoint of galore-torch or apollo-torch goes on in several processes. ``published_cells.py`` runs in them."""

MOVES = [("GaLoreAdamW", "fsdp2"), ("GaLoreAdamW", "zero3"), ("APOLLOAdamW", "zero2")]


def test_state_that_is_split_is_that_of_one_process(pool, tmp_path):
    """To the bit, by ``load_full_state``; ``load_state_dict`` says so."""
    cells = [{"optimizer": optimizer, "layout": layout} for optimizer, layout in MOVES]
    for told, move in zip(pool.call(2, "published_cells:taken_over", cells, str(tmp_path)), MOVES, strict=True):
        assert len(told["same"]) == 13, move
        assert all(all(keys.values()) for keys in told["same"].values()), (move, told["same"])
        keys = {"step", "exp_avg", "exp_avg_sq"} | ({"basis"} if move[0] == "GaLoreAdamW" else {"seed", "update_norm"})
        assert told["same"][0].keys() == keys, move
        if move[1] == "fsdp2":
            assert (
                "from galore-torch, and this one is split; load it by gracile.optim.load_full_state" in told["refused"]
            )
