using System;
using System.Runtime.InteropServices;
using System.Text;

namespace AlignedKV
{
    /// <summary>A failed call: its status, and a message that names the argument, its value and what was expected.</summary>
    public sealed class AlignedKVException : Exception
    {
        internal AlignedKVException(Status status, string text)
            : base(Name(status) + ": " + text)
        {
            Status = status;
        }

        /// <summary>What went wrong.</summary>
        public Status Status { get; private set; }

        static unsafe string Name(Status status)
        {
            return Library.Text(Native.akv_status_string((int)status));
        }
    }

    /// <summary>The native library.</summary>
    public static class Library
    {
        /// <summary>Name, version, commit and what is built in.</summary>
        public static unsafe string Version
        {
            get { return Text(Native.akv_version_string()); }
        }

        internal static unsafe string Text(byte* text)
        {
            int n = 0;
            while (text[n] != 0) n++;
            return n == 0 ? "" : Encoding.UTF8.GetString(text, n);
        }

        /// <summary>Throws unless a call succeeded. The text is this thread's: nothing may come between.</summary>
        internal static unsafe void Check(int status)
        {
            if (status == Native.AKV_OK) return;
            UIntPtr needed;
            Native.akv_last_error(null, UIntPtr.Zero, &needed);
            var text = new byte[(int)needed];
            fixed (byte* p = text)
            {
                Native.akv_last_error(p, needed, null);
                throw new AlignedKVException((Status)status, Text(p));
            }
        }

        internal static ArgumentException Short(string name, long have, long need)
        {
            return new ArgumentException("has " + have + " elements, expected " + need, name);
        }
    }

    /// <summary>
    /// Owner of a native object. It keeps the owner that it was made from alive, so that objects are destroyed in the right
    /// order, whoever is disposed or collected first.
    /// </summary>
    internal abstract class Handle : SafeHandle
    {
        readonly Handle parent;
        volatile bool disposed;

        protected Handle(Handle parent)
            : base(IntPtr.Zero, true)
        {
            bool added = false;
            if (parent != null) parent.DangerousAddRef(ref added);
            this.parent = parent;
        }

        public override bool IsInvalid
        {
            get { return handle == IntPtr.Zero; }
        }

        protected Handle Parent
        {
            get { return parent; }
        }

        protected abstract int Destroy(IntPtr handle);

        /// <summary>The object may outlive this, for those that were made from it: nobody else is let in any more.</summary>
        protected override void Dispose(bool disposing)
        {
            disposed = true;
            base.Dispose(disposing);
        }

        protected override bool ReleaseHandle()
        {
            bool done = Destroy(handle) == Native.AKV_OK;
            if (parent != null) parent.DangerousRelease();
            return done;
        }

        /// <summary>Gives the handle an object; without one (creation failed) it holds nothing, and nobody.</summary>
        public void Set(IntPtr value)
        {
            SetHandle(value);
        }

        public void Abandon()
        {
            if (parent != null) parent.DangerousRelease();
            SetHandleAsInvalid();
        }

        /// <summary>For the length of a call: the object stays, and a disposed one throws ObjectDisposedException.</summary>
        public Use Hold()
        {
            return new Use(this);
        }

        internal struct Use : IDisposable
        {
            readonly Handle owner;

            public Use(Handle owner)
            {
                if (owner.disposed) throw new ObjectDisposedException(owner.GetType().Name.Replace("Handle", ""));
                bool added = false;
                owner.DangerousAddRef(ref added);
                this.owner = owner;
            }

            public IntPtr Value
            {
                get { return owner.handle; }
            }

            public void Dispose()
            {
                owner.DangerousRelease();
            }
        }
    }
}
