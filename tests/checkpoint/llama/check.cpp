// What tests/checkpoint/test_gguf.py asks llama.cpp:
//   llama-check logits MODEL < token ids           float32 logits [tokens, vocabulary]; all in one batch, F32 cache
//   llama-check draft MODEL STREAMS < token ids    the same of an MTP model, whose inputs [tokens, width] STREAMS holds
//   llama-check tokens MODEL < text                token ids, one a line
#include "llama.h"

#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

static int fail(const char * what) {
    std::fprintf(stderr, "llama-check: %s\n", what);
    return 1;
}

static int print_tokens(const llama_model * model) {
    const std::string text{std::istreambuf_iterator<char>(std::cin), {}};
    std::vector<llama_token> tokens(text.size() + 8);
    const int count = llama_tokenize(
        llama_model_get_vocab(model), text.data(), int(text.size()), tokens.data(), int(tokens.size()), false, true);
    if (count < 0) {
        return fail("more tokens than bytes");
    }
    for (int i = 0; i < count; i++) {
        std::printf("%d\n", tokens[i]);
    }
    return 0;
}

static int print_logits(llama_model * model, const char * streams_file) {
    const std::vector<llama_token> tokens{std::istream_iterator<llama_token>(std::cin), {}};
    const int count = int(tokens.size());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = count + 1;
    params.n_batch = params.n_ubatch = count;
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.ctx_type = streams_file ? LLAMA_CONTEXT_TYPE_MTP : LLAMA_CONTEXT_TYPE_DEFAULT;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return fail("no context");
    }
    llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    std::vector<float> streams(streams_file ? size_t(count) * llama_model_n_embd_out(model) : 0);
    if (streams_file) {
        std::ifstream file(streams_file, std::ios::binary);
        file.read(reinterpret_cast<char *>(streams.data()), std::streamsize(streams.size() * sizeof(float)));
        if (!file) {
            return fail("too few streams");
        }
        batch.embd = streams.data();
    }
    for (int i = 0; i < count; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch) != 0) {
        return fail("decode failed");
    }
    const size_t width = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::fwrite(llama_get_logits(context), sizeof(float) * width, count, stdout);
    batch.embd = nullptr;  // the vector's
    llama_batch_free(batch);
    llama_free(context);
    return 0;
}

int main(int argc, char ** argv) {
    const std::string command = argc > 1 ? argv[1] : "";
    if (!((argc == 3 && (command == "logits" || command == "tokens")) || (argc == 4 && command == "draft"))) {
        return fail("usage: llama-check logits MODEL | draft MODEL STREAMS | tokens MODEL");
    }
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = command == "tokens";
    params.load_mtp = command == "draft";
    llama_model * model = llama_model_load_from_file(argv[2], params);
    if (!model) {
        return fail("no model");
    }
    const int status = command == "tokens" ? print_tokens(model) : print_logits(model, argc == 4 ? argv[3] : nullptr);
    llama_model_free(model);
    return status;
}
