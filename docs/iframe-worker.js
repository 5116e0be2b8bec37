// Browsers refuse a worker that comes from a file. From a folder the search's worker therefore runs
// in a hidden frame. It uses no more of a worker than `onmessage` and `postMessage`.
if (location.protocol === "file:")
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow;
          inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
          const script = inside.document.createElement("script");
          script.src = url;
          script.onload = () => resolve(inside);
          script.onerror = reject;
          inside.document.body.append(script);
        };
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      this.ready.then((inside) => inside.onmessage({ data }), (error) => this.onerror?.(error));
    }

    terminate() {
      this.frame.remove();
    }
  };
