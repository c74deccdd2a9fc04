// Links only if the wheel exports every function that threadpool.h declares.
#include "threadpool.h"

using executorch::extension::threadpool::get_pthreadpool;
using executorch::extension::threadpool::get_threadpool;

int main() {
    auto* pool = get_threadpool();
    pool->_unsafe_reset_threadpool(1);
    pthreadpool_executor executor{};
    pthreadpool_update_executor(get_pthreadpool(), &executor, nullptr);
    pthreadpool_release_executor_threads(get_pthreadpool());
    pthreadpool_set_threads_count(get_pthreadpool(), pthreadpool_get_threads_count(get_pthreadpool()));
    pool->run([](std::size_t) {}, pool->get_thread_count());
}
