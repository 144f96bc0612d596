// alignedkv_tensorrt.hpp: what an application that runs engines with AlignedKVAttention needs. It owns context and
// cache (alignedkv.h, backend AKV_CUDA), and begins and ends the steps; the plugin's layers find both under a key of
// TensorRT's plugin registry. Header only, C++17; link alignedkv. MIT OR Apache-2.0.
//
//   SharedCache shared(cache, layers);                         // akv_cache *, std::vector<akv_layer_desc>
//   registry->acquirePluginResource("alignedkv", &shared);     // before execution contexts are made
//   shared.open(stream, bounds);                               // a lane: the steps of one execution context
//
//   shared.begin(stream, step);                                // akv_batch_begin: refuses bad sequences here
//   context->enqueueV3(stream);                                // or cudaGraphLaunch and shared.replayed(stream)
//   shared.commit(stream);                                     // or shared.abort(stream)
//   shared.poll(&text);                                        // with akv_poll: what only the device found out
//
//   shared.close(stream);                                      // after the execution context
//   registry->releasePluginResource("alignedkv");
#ifndef ALIGNEDKV_TENSORRT_HPP
#define ALIGNEDKV_TENSORRT_HPP

#include <alignedkv.h>

#include <NvInferRuntime.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace alignedkv {

// The name changes with the layout of what application and plugin share: one of another version is not found.
inline namespace tensorrt_v1 {

// A begun step, as the tensors `sequences` and `lengths` should have it.
struct Step {
    std::vector<akv_sequence> sequences;
    std::vector<int32_t> lengths;
    int64_t n_new = 0, n_q = 0; // rows of k and v, of q
};

// The steps that run on one stream, one after another. Used by one thread at a time, but for `expected`.
struct Lane {
    akv_batch *batch = nullptr;
    akv_batch_desc bounds{};
    bool begun = false;
    Step step;
    bool checked = false;      // the step's work, or a captured one's, compares it with its tensors
    std::deque<Step> expected; // steps that have been begun and not compared yet; under the mutex
};

struct Shared {
    std::mutex mutex;
    akv_cache *cache = nullptr;
    std::vector<akv_layer_desc> layers;
    std::map<cudaStream_t, Lane> lanes;
    std::string fault; // the first, until it is polled

    Lane *lane(cudaStream_t stream) {
        std::lock_guard<std::mutex> lock(mutex);
        auto it = lanes.find(stream);
        return it == lanes.end() ? nullptr : &it->second;
    }
};

// The resource under the key. Copies share what they name. Different streams may be used by different threads at once.
// No call of the library is made under the mutex: it may wait for a stream, whose checks need the mutex.
class SharedCache final : public nvinfer1::IPluginResource {
public:
    // `cache` outlives it, and every execution context; `layers` are those that it was made of.
    SharedCache(akv_cache *cache, std::vector<akv_layer_desc> layers) : shared_(std::make_shared<Shared>()) {
        shared_->cache = cache;
        shared_->layers = std::move(layers);
    }

    // Makes the batch (akv_batch_create) of the steps that will run on `stream`: one per execution context.
    // Steps that are captured need max_sequences, max_q and max_kv, and all need them within the maxima of the
    // engine's profile, for which its workspace is made. AKV_E_BUSY if the stream has one.
    akv_status open(cudaStream_t stream, akv_batch_desc const &bounds) {
        if (shared_->lane(stream)) return AKV_E_BUSY;
        Lane lane;
        lane.bounds = bounds;
        if (akv_status status = akv_batch_create(shared_->cache, &bounds, &lane.batch)) return status;
        std::lock_guard<std::mutex> lock(shared_->mutex);
        shared_->lanes.emplace(stream, std::move(lane));
        return AKV_OK;
    }

    // Destroys it. The stream must be idle.
    akv_status close(cudaStream_t stream) {
        Lane *lane = shared_->lane(stream);
        if (!lane) return AKV_E_HANDLE;
        if (akv_status status = akv_batch_destroy(lane->batch)) return status;
        std::lock_guard<std::mutex> lock(shared_->mutex);
        shared_->lanes.erase(stream);
        return AKV_OK;
    }

    // akv_batch_begin, commit, abort, replayed of the stream's batch; AKV_E_HANDLE if it has none.
    akv_status begin(cudaStream_t stream, akv_batch_desc const &desc) {
        Lane *lane = shared_->lane(stream);
        if (!lane) return AKV_E_HANDLE;
        if (akv_status status = akv_batch_begin(lane->batch, &desc, stream)) return status;
        lane->step = {};
        for (uint32_t i = 0; i < desc.n_sequences; i++) {
            const int32_t n_new = desc.n_new ? desc.n_new[i] : 0;
            lane->step.sequences.push_back(desc.sequences[i]);
            lane->step.lengths.push_back(n_new);
            lane->step.n_new += n_new;
            lane->step.n_q += desc.n_q ? desc.n_q[i] : n_new;
        }
        lane->begun = true;
        lane->checked = false;
        std::lock_guard<std::mutex> lock(shared_->mutex);
        lane->expected.push_back(lane->step);
        return AKV_OK;
    }
    akv_status commit(cudaStream_t stream) { return end(stream, akv_batch_commit); }
    akv_status abort(cudaStream_t stream) { return end(stream, akv_batch_abort); }
    akv_status replayed(cudaStream_t stream) {
        Lane *lane = shared_->lane(stream);
        if (!lane) return AKV_E_HANDLE;
        lane->checked = true;
        return akv_batch_replayed(lane->batch);
    }

    // Returns and clears the first step that was not what its tensors said: AKV_OK if there is none so far. Waits for
    // nothing.
    akv_status poll(std::string *text) {
        std::lock_guard<std::mutex> lock(shared_->mutex);
        if (shared_->fault.empty()) return AKV_OK;
        if (text) *text = shared_->fault;
        shared_->fault.clear();
        return AKV_E_HANDLE;
    }

    // For the plugin.
    std::shared_ptr<Shared> shared() const { return shared_; }

    // TensorRT's: copies live in the registry.
    nvinfer1::IPluginResource *clone() noexcept override { return new (std::nothrow) SharedCache(*this); }
    int32_t release() noexcept override { return 0; }

private:
    akv_status end(cudaStream_t stream, akv_status (*call)(akv_batch *)) {
        Lane *lane = shared_->lane(stream);
        if (!lane) return AKV_E_HANDLE;
        if (akv_status status = call(lane->batch)) return status;
        std::lock_guard<std::mutex> lock(shared_->mutex);
        if (lane->begun && !lane->checked && !lane->expected.empty()) lane->expected.pop_back();
        lane->begun = false;
        return AKV_OK;
    }

    std::shared_ptr<Shared> shared_;
};

} // namespace tensorrt_v1
} // namespace alignedkv

#endif
