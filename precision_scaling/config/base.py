"""Every option there is, with its default. Other configs start from this one and change what they need.

Train one model:

    python -m precision_scaling.train --config=configs/base.py --workdir=runs/first

Any option can be set on the command line, e.g. --config.model.size=100k --config.precision.weights=int4
--config.train.tokens=1e6 --config.ptq.methods=gptq,rtn; options.py has the values that each may have. Expected with the
defaults on two CPU cores: one minute, validation loss 2.0.
"""

import ml_collections
from ml_collections import config_dict

AUTO = "auto"  # for what `train` and `study` choose


def get_config() -> ml_collections.ConfigDict:
    """The default config: a tiny bf16-precision model on the Python standard library's sources, as bytes."""
    c = ml_collections.ConfigDict()

    c.data = ml_collections.ConfigDict()
    # Corpus: the sources of Python's standard library on this machine, with those of all installed packages
    # ("python_stdlib/packages"), "text" (files of one's own), "dolma", or any TFDS name, e.g. "lm1b".
    c.data.name = "python_stdlib"
    # text: a file, a directory or a pattern of .txt, .md, .jsonl(.gz, .zst), .json.gz, .parquet. python_stdlib: a
    # directory of Python sources instead of the standard library. dolma: a directory or pattern of its json.gz shards,
    # or a .txt file with a path or URL in each line.
    c.data.root = ""
    c.data.split = "train"  # TFDS split that holds the documents
    c.data.validation_split = ""  # TFDS split of validation documents; empty: held out of `split` by document
    c.data.feature = "text"  # name of the text feature, or of the field in .jsonl, .json.gz and .parquet
    # "bytes", "bpe:VOCAB" (trained on the corpus), or "file:PATH" of a tokenizer.json; "file:PATH?end_of_text=TOKEN"
    # with the name or id of its end of text where that has none of the usual names, or where several have one.
    c.data.tokenizer = "bytes"
    # Attention and positions stay within documents, in training, evaluation and calibration; each document begins with
    # the end of text before it. False: windows are read as a whole.
    c.data.within_documents = False
    c.data.validation_fraction = 0.05  # share of documents held out, by a hash of their content
    c.data.split_seed = 0  # another seed holds out other documents
    c.data.hash = ""  # required hash of the corpus (the table's column `corpus`); empty: any
    c.data.cache_dir = ""  # token files and datasets; empty: precision_scaling below $XDG_CACHE_HOME or ~/.cache
    c.data.tfds_dir = ""  # TFDS data_dir of datasets other than python_stdlib; empty: below cache_dir
    c.data.beam_options = ""  # flags of Apache Beam, which prepares dolma, e.g. "--runner=DataflowRunner --project=..."
    c.data.workers = 0  # processes that tokenize; 0: one per core. The tokens do not depend on it

    c.model = ml_collections.ConfigDict()
    # Sets width, depth, heads and mlp_width; the names are in model/sizes.py. Empty: they must be set. A model whose
    # number of parameters is not that of its size is named by the number.
    c.model.size = "25k"
    c.model.width = 0  # 0: by size. Width of the residual stream
    c.model.depth = 0  # 0: by size. Number of layers
    c.model.heads = 0  # 0: by size. Attention heads; must divide the width into even parts
    c.model.kv_heads = 0  # 0: as many as heads. Heads of keys and values (grouped queries); a divisor of heads
    c.model.head_width = 0  # 0: width / heads. Width of a head, even
    c.model.mlp_width = 0  # 0: by size, or 8/3 of a width that is set. Width of the SwiGLU MLP
    c.model.vocab_size = 0  # 0: the tokenizer's. Rows of the embedding, at least as many as the tokenizer has ids
    c.model.sequence_length = 64  # tokens per sequence
    c.model.dtype = "float32"  # compute dtype: float32 or bfloat16; parameters are always float32
    c.model.rope_theta = 10_000.0  # base of the rotary embedding's wavelengths
    # Stretched wavelengths: "linear:FACTOR", Llama 3.1's "llama3:FACTOR,LOW,HIGH,ORIGINAL_LENGTH" or YaRN's
    # "yarn:FACTOR,ORIGINAL_LENGTH,FAST,SLOW,ATTENTION_FACTOR". Empty: none.
    c.model.rope_scaling = ""
    c.model.norm_placement = "pre"  # "pre": x + f(norm(x)), or "post": x + norm(f(x)), as in OLMo 2
    c.model.norm_type = "rms"  # "rms" with learned gains, or "layer" without parameters, as in OLMo
    # Norm of queries and keys before they are rotated: "none", "projection" (all heads, OLMo 2) or "head" (Qwen 3).
    c.model.qk_norm = "none"
    c.model.norm_epsilon = 1e-5  # added to the mean square in every norm
    c.model.qkv_bias = False  # biases of queries, keys and values, as in Qwen 2
    c.model.tie_embeddings = False  # the head shares the embedding's weights; N counts neither
    # What the backward pass recomputes to save memory: "none", "dots" (all but the products of projections), or "full"
    # (each block from its input; a third more time). "auto": the least that fits the devices, by their compiler.
    c.model.remat = "none"
    # "whole" (an array of all scores), "blocks" (in the memory of queries, keys and values), or "cudnn" (the same, on
    # a GPU); the latter two for exact queries and probabilities. "auto": blocks there from 1024 positions on, or whole.
    c.model.attention = "auto"
    # How rates, weight decay, residual branches and logits depend on width and depth: "completep" or "depth_mup".
    c.model.parametrization = "completep"
    # That equals the standard parametrization at this size's width and depth. Empty: at the model's own.
    c.model.base_size = "25k"
    c.model.imported = ""  # set by `precision_scaling.huggingface import`: which model, trained elsewhere, this is

    c.precision = ml_collections.ConfigDict()
    # Sets every option below that is left empty: "paper" (nothing is quantized until a format is named), "qat" (int4
    # weights), "low_precision" (int8 weights, activations, keys and values), "fp8", "int8_full", "mxfp4", "nvfp4", and
    # "nvfp4_train" and "mxfp8_train", as models are trained in them.
    c.precision.preset = "paper"
    # Operands by number format: a name ("int4", "e4m3", "mxfp4", "bf16") or bits (4); 16 bits and above are not
    # quantized. What shares a scale and the rounding may follow: "int4/group:32", "int4/token/stochastic".
    c.precision.weights = ""  # kernels of all projections (P_w)
    c.precision.activations = ""  # inputs of all projections (P_a)
    c.precision.q = ""  # queries
    c.precision.k = ""  # keys; k and v are the KV cache (P_kv)
    c.precision.v = ""  # values
    c.precision.p = ""  # attention probabilities
    c.precision.embedding = ""  # the embedding; no preset quantizes it, nor the head
    c.precision.head_weights = ""  # kernel of the head
    c.precision.head_activations = ""  # inputs of the head
    # Elements that share a scale: "tensor", "token", "channel" (weights: an output channel), "group:32" (any number of
    # elements along the contraction), or of weights "tile:16" (a square). Block formats have groups of their own.
    c.precision.weights_granularity = ""  # paper: "channel"
    c.precision.activations_granularity = ""  # paper: "tensor"
    c.precision.attention_granularity = ""  # of q, k, v and p; paper: "tensor"
    c.precision.embedding_granularity = ""  # paper: "token", one per row
    # "nearest" or "stochastic" (unbiased, redrawn at each step; evaluation rounds to nearest).
    c.precision.weights_rounding = ""
    c.precision.activations_rounding = ""
    c.precision.attention_rounding = ""
    c.precision.embedding_rounding = ""
    # Other formats in some layers and places: "first:2=bf16, last:15%=bf16, *.down=e4m3, 3-5.qkv=w8_a8"; the first rule
    # counts. Places: qkv, out, gate_up, down, attention (q, k, v, p). A format alone is for what is quantized there.
    # One program serves all of them. "none": no rule, where the preset has some.
    c.precision.layers = ""
    # Other formats, as in a grid, from a share of the steps on, or from where the learning rate decays: "0.5=w8_a8,
    # decay=w4_a4". Any number, in one program.
    c.precision.switches = ""
    c.precision.rotation = ""  # "none" or "hadamard": random Hadamard rotation of both operands of each projection
    # "simulated" (any format) or "native": int8, fp8, mxfp8 or nvfp4 codes in the product itself, where format and
    # device have one.
    c.precision.mode = ""

    # Backward pass. The gradient of each operand is a product of the incoming gradient, in the format `_gradient`, and
    # of the other operand as it was saved, `_saved`: "forward" (as the forward pass quantized it), "exact" or a format.
    c.precision.backward = ml_collections.ConfigDict()
    c.precision.backward.activations_gradient = ""  # input gradient dx = dy·wᵀ: dy
    c.precision.backward.activations_saved = ""  # input gradient: w
    c.precision.backward.weights_gradient = ""  # weight gradient dw = xᵀ·dy: dy
    c.precision.backward.weights_saved = ""  # weight gradient: x
    c.precision.backward.q_gradient = ""  # dq = ds·k, s the scores: ds
    c.precision.backward.q_saved = ""  # k there
    c.precision.backward.k_gradient = ""  # dk = dsᵀ·q: ds
    c.precision.backward.k_saved = ""  # q there
    c.precision.backward.p_gradient = ""  # dp = do·vᵀ, o the weighted values: do
    c.precision.backward.p_saved = ""  # v there
    c.precision.backward.v_gradient = ""  # dv = pᵀ·do: do
    c.precision.backward.v_saved = ""  # p there
    # "tensor", "vector" (one per vector along the contraction of that product) or "group:32".
    c.precision.backward.gradient_granularity = ""
    c.precision.backward.saved_granularity = ""
    # "nearest", "stochastic", or "eden" (of rotated blocks with float scales: unbiased, with less than half the error)
    c.precision.backward.gradient_rounding = ""
    c.precision.backward.saved_rounding = ""
    # "none", or "hadamard:16": both operands of a gradient, which then have formats, rotated along the contraction.
    c.precision.backward.weights_rotation = ""
    c.precision.backward.activations_rotation = ""

    c.optimizer = ml_collections.ConfigDict()
    # "adamw", or "muon": orthogonal updates (Newton-Schulz) of the blocks' kernels, AdamW for all else.
    c.optimizer.name = "adamw"
    c.optimizer.peak_lr = 4e-3  # learning rate after warm-up, at base_size; other sizes scale it by depth-µP
    c.optimizer.embedding_rate = 1.0  # rate of the embedding as a multiple of that
    c.optimizer.head_rate = 1.0  # of the head
    c.optimizer.vector_rate = 1.0  # of norm gains and biases
    # After warm-up: "cosine", "linear", "constant", or "wsd" (constant, then linear over the last decay_fraction).
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_fraction = 0.1  # share of the steps spent on linear warm-up
    c.optimizer.warmup_steps = 0  # 0: by warmup_fraction. With it, wsd and constant runs share their first steps
    c.optimizer.decay_fraction = 0.2  # share of the steps in which a wsd schedule decays
    c.optimizer.final_fraction = 0.1  # decaying schedules end at this fraction of the peak
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.95
    c.optimizer.epsilon = 1e-15
    c.optimizer.muon_beta = 0.95  # muon: momentum of the blocks' kernels; the others have beta1, beta2 and epsilon
    c.optimizer.weight_decay = 0.1  # decoupled
    c.optimizer.decay_pattern = "kernel|embedding"  # regex on the paths of parameters that decay: all but norms
    # Decays of averages of the parameters (EMA), e.g. (0.99, 0.999); each is evaluated and quantized as its own run.
    c.optimizer.ema = ()
    c.optimizer.z_loss = 0.0  # weight of mean(log² Z) in the training loss, 1e-4 in PaLM; never in what is reported
    # In which devices add up the gradients of kernels where model.dtype is bfloat16; "bfloat16" sends half as much.
    c.optimizer.gradient_sum = "float32"
    c.optimizer.clip_norm = 1.0  # global gradient norm; 0: no clipping

    c.train = ml_collections.ConfigDict()
    c.train.tokens = 1_000_000  # D, rounded down to whole batches
    c.train.batch_size = 16  # sequences per step
    # Parts that a batch is computed in, one after another; scales are per part. "auto": the fewest that fit.
    c.train.microbatches = _whole_or_auto(1)
    c.train.seed = 0  # initialization and data order
    c.train.log_every = 50  # steps between lines of metrics.jsonl
    c.train.trackers = ()  # also log to "tensorboard", "wandb"
    c.train.checkpoint_seconds = 60.0  # between checkpoints: work lost when a process is killed
    # How often a run whose loss or gradient is not finite returns to its last checkpoint and skips that batch; 0: it
    # ends there.
    c.train.rewinds = 0
    c.train.steps_per_dispatch = 100  # steps per dispatch to the device, at most (or ten seconds)

    c.evaluate = ml_collections.ConfigDict()
    c.evaluate.sequences = 512  # fixed validation sequences, spread over the held-out documents
    c.evaluate.batch_size = 64  # sequences per evaluation step

    c.ptq = ml_collections.ConfigDict()
    # Post-training quantization of each run: gptq, awq and rtn (kernels), smoothquant (kernels and activations),
    # kv_cache (keys and values alone). Empty: none.
    c.ptq.methods = ("gptq", "rtn")
    c.ptq.bits = (3, 4, 5, 6)  # bit-widths of integer grids, 2 to 8
    c.ptq.formats = ()  # other formats of kernels (gptq and rtn), e.g. ("e2m1", "mxfp4", "nvfp4")
    c.ptq.calibration_sequences = 128  # training sequences for Hessians and magnitudes
    c.ptq.damping = 0.01  # fraction of the mean of the Hessian's diagonal added to it
    # Rows of different values of these stand beside each other; a method ignores options that it does not have.
    c.ptq.group_size = 0  # inputs that share a scale in an output channel; 0: all of them
    c.ptq.symmetric = True  # levels ±(2^(b-1) - 1); False: 2^b levels from a zero point
    c.ptq.full_range = False  # symmetric grids with all 2^b levels, from -2^(b-1)
    c.ptq.act_order = False  # GPTQ: inputs by decreasing Hessian diagonal
    c.ptq.clip = (
        False  # clip ranges to the least squared error (GPTQ: weighed by the Hessian); AWQ has a search of its own
    )
    c.ptq.rotate = False  # the residual stream is rotated first, by a matrix that goes into the weights
    c.ptq.correct_inputs = 0.0  # GPTQ: share of the error of a kernel's inputs that it is corrected for first (GPTAQ)
    c.ptq.smoothing = 0.5  # SmoothQuant's alpha: share of the activations' range moved into the kernels
    # Bits or formats by layer and projection, by rules as in precision.layers: "first:1=8, last:1=8, 3-5.qkv=3,
    # *.down=4"; what no rule names keeps bits or formats.
    c.ptq.layers = ""
    c.ptq.target_bits = 0.0  # mean bits of a weight; each projection gets one of `bits`, by what it costs in loss
    c.ptq.granularity = "tensor"  # scales of activations, keys and values: per "tensor" or "token"

    c.study = ml_collections.ConfigDict()
    # Runs of one shape that train at once (vmap), fewer where memory holds fewer; the results are the same.
    c.study.lanes = 4
    # Named parts of the grid, each the product of its lists. Empty: one run, with the options above.
    c.study.grid = ml_collections.ConfigDict()

    # Devices along each axis of the mesh; one may be -1: all that are left. Results differ by rounding only.
    # --config.mesh=auto: run and fsdp are "auto", what fits with the least traffic.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.slices = -1  # TPU slices, each of which has a part of `data`; -1: those of the devices
    c.mesh.run = _whole_or_auto(1)  # runs that train at once; divides study.lanes
    c.mesh.data = -1  # parts of the batch
    c.mesh.fsdp = _whole_or_auto(1)  # parts of the batch, of the parameters and of the optimizer state
    c.mesh.tensor = 1  # parts of each layer's heads and MLP; divides the heads

    c.compilation_cache = ""  # compiled programs; empty: xla beside the token files, "none": no cache
    c.lock()  # a misspelt option in a config that starts from this one is an error
    c.study.grid.unlock()
    return c


def _whole_or_auto(value: int) -> config_dict.FieldReference:
    """A default whose option may be set to a whole number or to AUTO; `options` checks which it is."""
    return config_dict.FieldReference(value, field_type=object)


def grid(
    sizes: tuple[str, ...],
    tokens: tuple[int, ...],
    precisions: tuple[str, ...] = ("bf16",),
    seeds: tuple[int, ...] = (0,),
    ptq: bool = False,
    schedules: tuple[str, ...] = (),
) -> ml_collections.ConfigDict:
    """One part of a study's grid: every size × token budget × precision × seed.

    precisions: "bf16", a preset of config.precision, or parts with formats joined by "_": w (weights), a (activations),
    kv (keys and values), g (incoming gradients of the projections), or q, k, v, p individually; e.g. "w4", "a6",
    "w4_a4_kv4", "we2m1/group:32", "fp8", "fp8_kv8". "w4@0.8": from that share of the steps on; "w8_w4@decay": from the
    decay of the rate on. After a blank, "w4_a4 @0.8 last:1=bf16 rotation=hadamard": when all of them begin, rules by
    layer, and options of config.precision. ptq: quantize these runs after training. schedules: of the learning rate,
    one run for each; empty: config.optimizer.schedule.
    """
    return ml_collections.ConfigDict(
        {"sizes": sizes, "tokens": tokens, "precisions": precisions, "seeds": seeds, "ptq": ptq, "schedules": schedules}
    )
